"""``expertmesh``: the command line. Each command is in a file of its own and imports what is heavy itself."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="expertmesh",
    help="Serve Mixture-of-Experts language models from separate fleets of attention and expert actors.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Target = Annotated[str, typer.Option("--target", metavar="HOST:PORT", help="The gateway to talk to.")]
DEFAULT_TARGET = "127.0.0.1:50051"


@app.command()
def serve(
    model: Annotated[str | None, typer.Option(help="A checkpoint's folder, or 'default'.")] = None,
    config: Annotated[Path | None, typer.Option(metavar="FILE.yaml", help="Configuration; flags win over it.")] = None,
    grpc_port: Annotated[int | None, typer.Option(help="Port of the gRPC gateway; 0 takes a free one.")] = None,
) -> None:
    """Start the cluster and serve until Ctrl-C."""
    from cluster.cli.serve import run_serve

    raise typer.Exit(run_serve(model, config, grpc_port))


@app.command()
def generate(
    text: Annotated[str, typer.Argument(help="The user's message, or with --raw the text to continue.")],
    target: Target = DEFAULT_TARGET,
    chat: Annotated[
        bool, typer.Option("--chat/--raw", help="Render the chat template, or take the text as it is.")
    ] = True,
    max_tokens: Annotated[int | None, typer.Option(help="At most this many tokens.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy; unset: the model's default.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus sampling; unset: the model's default.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Only the k most likely tokens; 0: all.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes a sampled answer repeatable.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be given again.")] = None,
) -> None:
    """Stream one answer to the terminal."""
    from cluster.cli.generate import Sampling, run_generate

    sampling = Sampling(temperature, top_p, top_k, seed)
    raise typer.Exit(run_generate(text, target, chat, max_tokens, sampling, stop or []))


@app.command()
def status(target: Target = DEFAULT_TARGET) -> None:
    """Show actors, nodes, bundles, wires, the expert map's epoch, and rows per expert shard."""
    from cluster.cli.status import run_status

    raise typer.Exit(run_status(target))


@app.command()
def stop(
    ray_address: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="The Ray cluster; auto: this machine's.")
    ] = "auto",
) -> None:
    """End a cluster whose `expertmesh serve` is gone (killed, or its terminal closed)."""
    from cluster.cli.stop import run_stop

    raise typer.Exit(run_stop(ray_address))


@app.command()
def demo(
    text: Annotated[str, typer.Argument(help="The user's message.")] = "What is the capital of France?",
) -> None:
    """Start a cluster on this machine, stream one chat answer, show what runs where, stop it."""
    from cluster.cli.demo import run_demo

    raise typer.Exit(run_demo(text))


if __name__ == "__main__":
    app()
