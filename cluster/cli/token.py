"""``expertmesh token``: a new token, and what the configuration has to know of it."""

from __future__ import annotations

import sys

import yaml

from cluster.access import new_token, token_hash
from cluster.cli.terminal import complain
from cluster.config import ConfigError, load_config


def run_token(tenant: str, role: str, share: float) -> int:
    """The token on stdout, so that it can go into a file; its entry for the configuration on stderr."""
    token = new_token()
    entry = {"sha256": token_hash(token), "tenant": tenant, "role": role, "share": share}
    try:
        load_config(None, {"access.tokens": [entry]})
    except ConfigError as error:
        return complain(str(error).replace("access.tokens.0.", "--"))
    print("the token is on stdout and kept nowhere; the configuration takes:", file=sys.stderr)
    print(yaml.safe_dump({"access": {"tokens": [entry]}}, sort_keys=False), end="", file=sys.stderr, flush=True)
    print(token)
    return 0
