"""``expertmesh``: the command line. Each command is in a file of its own and imports what is heavy itself."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from cluster.cli.connection import Connection, connecting

_UINT32 = 2**32 - 1

app = typer.Typer(
    name="expertmesh",
    help="Serve Mixture-of-Experts language models from separate fleets of attention and expert actors.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

batch = typer.Typer(help="Offline inference: a file of requests in, a file of answers out.", no_args_is_help=True)
app.add_typer(batch, name="batch")


@app.command()
def serve(
    model: Annotated[
        str | None, typer.Option(help="A checkpoint's folder, ORG/NAME[@REVISION] of the hub, or 'default'.")
    ] = None,
    config: Annotated[Path | None, typer.Option(metavar="FILE.yaml", help="Configuration; flags win over it.")] = None,
    grpc_port: Annotated[int | None, typer.Option(help="Port of the gRPC gateway; 0 takes a free one.")] = None,
    http_port: Annotated[int | None, typer.Option(help="Port of the HTTP gateway; 0 takes a free one.")] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Off loopback, serve even without TLS or tokens.")
    ] = False,
    quantization: Annotated[
        str | None,
        typer.Option(metavar="KIND", help="Quantise the experts at load: w8a8, w4a8, int8, int4, fp8 or none."),
    ] = None,
) -> None:
    """Start the cluster and serve until Ctrl-C."""
    from cluster.cli.serve import run_serve

    raise typer.Exit(run_serve(model, config, grpc_port, http_port, insecure, quantization))


@app.command()
@connecting
def generate(
    connection: Connection,
    text: Annotated[str, typer.Argument(help="The user's message, or with --raw the text to continue.")],
    chat: Annotated[
        bool, typer.Option("--chat/--raw", help="Render the chat template, or take the text as it is.")
    ] = True,
    max_tokens: Annotated[int | None, typer.Option(min=1, max=_UINT32, help="At most this many tokens.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy; unset: the model's default.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus sampling; unset: the model's default.")] = None,
    top_k: Annotated[
        int | None, typer.Option(min=0, max=_UINT32, help="Only the k most likely tokens; 0: all.")
    ] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Leaves out tokens less likely than so much of the most likely one; 0 to 1.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, max=2**64 - 1, help="Makes a sampled answer repeatable.")] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Above 1: fewer tokens of prompt and answer again; up to 2.")
    ] = None,
    presence_penalty: Annotated[
        float | None, typer.Option(help="Above 0: fewer tokens of the answer again; -2 to 2.")
    ] = None,
    frequency_penalty: Annotated[
        float | None, typer.Option(help="The same for each time that a token is there; -2 to 2.")
    ] = None,
    min_tokens: Annotated[int | None, typer.Option(min=0, max=_UINT32, help="At least this many tokens.")] = None,
    n: Annotated[
        int | None, typer.Option("--n", min=1, max=16, help="So many answers, shown when all are there.")
    ] = None,
    priority: Annotated[
        Literal["interactive", "batch"] | None, typer.Option(help="batch: after all interactive requests.")
    ] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be given again.")] = None,
) -> int:
    """Stream one answer to the terminal, or show several."""
    from cluster.cli.generate import Sampling, Stopping, run_generate

    penalties = (repetition_penalty, presence_penalty, frequency_penalty)
    sampling = Sampling(temperature, top_p, top_k, seed, min_p, *penalties)
    stopping = Stopping(max_tokens, min_tokens, stop or ())
    return run_generate(text, connection, chat, sampling, stopping, n, priority)


@batch.command("run")
@connecting
def batch_run(
    connection: Connection,
    requests: Annotated[Path, typer.Argument(metavar="IN.jsonl", help="One request a line, as OpenAI's batch API.")],
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="OUT.jsonl", help="Answers; what is there already is not redone.")
    ],
    concurrency: Annotated[int, typer.Option(min=1, max=4096, help="Requests at the gateway at once.")] = 32,
    retries: Annotated[int, typer.Option(min=0, help="Attempts after the first, before a row counts as failed.")] = 5,
    patience: Annotated[float, typer.Option(min=0, help="Seconds that the cluster may be away or full.")] = 300.0,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Keys the draws of rows without a seed; unset: the input does.")
    ] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Do the rows of OUT.jsonl.errors.jsonl again.")
    ] = False,
    accept_changes: Annotated[
        bool, typer.Option("--accept-changes", help="Go on although input, model or seed are not those of the output.")
    ] = False,
) -> int:
    """Answer every row of a file; killed or stopped at any time, the same command goes on."""
    from cluster.batch.job import Wanted
    from cluster.batch.run import Limits
    from cluster.cli.batch import run_batch

    wanted = Wanted(seed, accept_changes, retry_failed)
    return run_batch(connection, requests, output, wanted, Limits(concurrency, retries), patience)


@app.command()
@connecting
def status(
    connection: Connection,
    experts: Annotated[bool, typer.Option("--experts", help="Also show where each expert is, and its rows.")] = False,
) -> int:
    """Show actors, nodes, bundles, wires, the expert map's epoch, rows per expert shard, and what happened lately."""
    from cluster.cli.status import run_status

    return run_status(connection, experts)


@app.command()
@connecting
def scale(
    connection: Connection,
    wanted: Annotated[list[str], typer.Argument(metavar="FLEET=N...", help="experts=N, attention=N, or both.")],
) -> int:
    """Change how many expert shards or attention replicas there are; streams run on."""
    from cluster.cli.operate import run_scale

    return run_scale(connection, wanted)


@app.command()
@connecting
def rebalance(connection: Connection) -> int:
    """Spread the experts over the same shards by the load that was counted."""
    from cluster.cli.operate import run_rebalance

    return run_rebalance(connection)


@app.command()
@connecting
def drain(
    connection: Connection,
    actor: Annotated[str | None, typer.Argument(help="An attention or expert shard; it is not replaced.")] = None,
    node: Annotated[
        str | None, typer.Option(metavar="ID", help="Everything on this node; as many start elsewhere.")
    ] = None,
    undo: Annotated[bool, typer.Option("--undo", help="Let a drained node be used again.")] = False,
) -> int:
    """Take one shard, or everything on a node, out of service; streams run on."""
    from cluster.cli.operate import run_drain

    return run_drain(connection, actor, node, undo)


@app.command()
@connecting
def watch(connection: Connection) -> int:
    """Print what happens to the cluster, as it happens, until Ctrl-C."""
    from cluster.cli.operate import run_watch

    return run_watch(connection)


@app.command()
@connecting
def trace(
    connection: Connection,
    steps: Annotated[int, typer.Option(metavar="N", help="Of each attention shard, 1 to 1000.")] = 10,
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="FILE.json", help="For ui.perfetto.dev; overwritten.")
    ] = Path("trace.json"),
    timeout: Annotated[
        float, typer.Option(metavar="S", help="Seconds to wait for the steps, up to 600; 0: 30.")
    ] = 30.0,
) -> int:
    """Record what every actor does in the next steps, as a timeline on one clock."""
    from cluster.cli.trace import run_trace

    return run_trace(connection, steps, timeout, output)


@app.command()
def inspect(
    model: Annotated[
        str, typer.Argument(help="A checkpoint's folder, a config.json, ORG/NAME[@REVISION] of the hub, or 'default'.")
    ],
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Such as 80GiB: how many shards of it are needed.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs; sizes in bytes.")] = False,
) -> None:
    """Show how large a model is and how it divides over shards, and check its files, without loading it."""
    from cluster.cli.inspect import run_inspect

    raise typer.Exit(run_inspect(model, memory, as_json))


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
def token(
    tenant: Annotated[str, typer.Option(help="Whose token it is.")],
    role: Annotated[str, typer.Option(help="user, or admin: may look at the cluster and change it.")] = "user",
    share: Annotated[float, typer.Option(help="The tenant's weight beside other tenants'.")] = 1.0,
) -> None:
    """Make a token for a tenant: the token itself on stdout, its entry for the configuration on stderr."""
    from cluster.cli.token import run_token

    raise typer.Exit(run_token(tenant, role, share))


@app.command()
def demo(
    text: Annotated[str, typer.Argument(help="The user's message.")] = "What is the capital of France?",
) -> None:
    """Start a cluster on this machine, stream one chat answer, show what runs where, stop it."""
    from cluster.cli.demo import run_demo

    raise typer.Exit(run_demo(text))


if __name__ == "__main__":
    app()
