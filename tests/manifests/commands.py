"""Command lines of ``expertmesh`` in manifests and pages: they have to be ones that the program takes."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator

import typer
from typer.core import TyperGroup
from typer.exceptions import TyperException

from cluster.cli.main import app
from tests.manifests.documents import Document, name_of
from tests.manifests.pods import pods_of


def command_problems(documents: Iterable[Document]) -> Iterator[str]:
    """Of containers' commands, scripts in ConfigMaps, and jobs."""
    documents = list(documents)
    for pod in pods_of(documents):
        for container in pod.containers:
            for text in [*container.get("command", []), *container.get("args", [])]:
                yield from script_problems(f"{pod.where}: {container['name']}", text)
    for document in documents:
        if document["kind"] == "RayJob":
            yield from script_problems(f"{name_of(document)}: entrypoint", document["spec"]["entrypoint"])
        if document["kind"] == "ConfigMap":
            for name, text in document["data"].items():
                if name.endswith(".sh"):
                    yield from script_problems(f"{name_of(document)}: {name}", text)


def script_problems(where: str, text: str) -> Iterator[str]:
    """Of every line of ``text`` that runs ``expertmesh``."""
    for line in text.replace("\\\n", " ").splitlines():
        words = _words(line)
        for index, word in enumerate(words):
            if word == "expertmesh" and (index == 0 or words[index - 1] in _BEFORE):
                yield from _problems(where, _until_operator(words[index + 1 :]))
            elif " " in word:  # a command line in quotes, for another shell
                yield from script_problems(where, word)


_BEFORE = {"exec", "--", "&&", ";", "|", "$"}
_OPERATORS = {"&&", ";", "|", ">", "2>", "&", "||", ")"}


def _words(line: str) -> list[str]:
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|>()")
    lexer.whitespace_split = True
    try:
        return list(lexer)
    except ValueError:  # a quote that goes on in the next line: prose, or a here-document
        return []


def _until_operator(words: list[str]) -> list[str]:
    for index, word in enumerate(words):
        if word in _OPERATORS:
            # "2>" comes as two words
            return words[: index - 1] if word == ">" and index and words[index - 1] == "2" else words[:index]
    return words


def _problems(where: str, words: list[str]) -> Iterator[str]:
    """Parsed as the program would, without running anything."""
    command = typer.main.get_command(app)
    name, rest = "expertmesh", words
    while isinstance(command, TyperGroup):
        if not rest or rest[0] not in command.commands:
            yield f"{where}: {name} {' '.join(rest[:1])}: no such command; there are {', '.join(command.commands)}"
            return
        name, command, rest = f"{name} {rest[0]}", command.commands[rest[0]], rest[1:]
    try:
        command.make_context(name, list(rest))
    except TyperException as error:
        yield f"{where}: {name}: {error}"
