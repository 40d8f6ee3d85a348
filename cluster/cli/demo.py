"""``expertmesh demo``: a cluster on this machine, one streamed answer, what ran where for it, and all of it gone."""

from __future__ import annotations

import sys

from cluster.cli.connection import Connection
from cluster.cli.generate import run_generate
from cluster.cli.serve import Stopped, StopSignals, expected_errors, ready_cluster, weight_bytes
from cluster.cli.status import run_status
from cluster.cli.terminal import complain
from cluster.config import load_config


def run_demo(text: str) -> int:
    """One attention shard, one router, two expert shards, one gateway on a free port; the exit status.

    A machine by itself gets one expert shard; with two it is seen how rows go to several.
    """
    config = load_config(None, {"gateway.port": 0, "gateway.http_port": 0, "experts.shards": 2})
    signals = StopSignals()
    try:
        with ready_cluster(config, weight_bytes(config), signals) as doors:
            signals.check()
            connection = Connection(doors.grpc)
            signals.interrupting = True
            print(f"\n> {text}", flush=True)
            status = run_generate(text, connection)
            print()
            status |= run_status(connection)  # after the answer: the rows and bytes that it took are in it
            signals.interrupting = False
            print("\nstopping", file=sys.stderr, flush=True)
    except (Stopped, SystemExit):
        print("stopped", file=sys.stderr)
        return 130
    except expected_errors() as error:
        return complain(str(error))
    return status
