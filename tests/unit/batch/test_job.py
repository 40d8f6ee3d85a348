"""A batch on disk: what goes on, what starts anew, and what is refused."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from cluster.batch.errors import BadInput, BatchError, Changed
from cluster.batch.job import Job, Wanted, errors_path, open_job
from cluster.batch.manifest import manifest_path, read_manifest

MODEL = {"model": "tiny", "dtype": "float32"}


@pytest.fixture
def given(tmp_path: Path) -> Path:
    return write_input(tmp_path / "in.jsonl", "abc")


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


def write_input(path: Path, names: str) -> Path:
    rows: list[dict[str, Any]] = [
        {"custom_id": name, "method": "POST", "url": "/v1/completions", "body": {"prompt": name}} for name in names
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def result(name: str) -> bytes:
    return json.dumps({"custom_id": name}).encode() + b"\n"


def pending(job: Job) -> str:
    return "".join(row.custom_id for row in job.pending(threading.Event()))


def begun(given: Path, output: Path, answered: str = "", failed: str = "") -> None:
    """A run that ended after these rows."""
    with open_job(given, output, Wanted()) as job:
        job.begin(MODEL)
        job.results.append([result(name) for name in answered])
        job.errors.append([result(name) for name in failed])


def test_a_batch_goes_on_where_it_was(given: Path, output: Path) -> None:
    with open_job(given, output, Wanted()) as job:
        assert pending(job) == "abc"
        first = job.begin(MODEL)
    begun(given, output, "b", "c")
    with open_job(given, output, Wanted()) as job:
        assert pending(job) == "a"
        tally = job.tally
        assert (tally.rows, tally.earlier, tally.earlier_failed, tally.left) == (3, 1, 1, 1)
        second = job.begin(MODEL)
        assert second == job.begin(MODEL)
    assert read_manifest(manifest_path(output)) == second
    assert second.seed == first.seed  # the input's own
    assert second.batch == first.batch


def test_the_torn_end_is_told_and_done_again(given: Path, output: Path) -> None:
    begun(given, output, "a")
    with output.open("ab") as file:
        file.write(result("b")[:-1])
    with open_job(given, output, Wanted()) as job:
        assert job.notes == [f"{output}: cut off 18 bytes of a line that was not complete"]
        assert pending(job) == "bc"
    assert output.read_bytes() == result("a")


def test_retry_failed_redoes_just_them_once_there_is_a_gateway(given: Path, output: Path) -> None:
    begun(given, output, "a", "bc")
    with open_job(given, output, Wanted()) as job:
        assert pending(job) == ""
    with open_job(given, output, Wanted(retry_failed=True)) as job:
        assert pending(job) == "bc"
        assert job.tally.left == 2
        assert errors_path(output).stat().st_size  # no gateway yet
        job.begin(MODEL)
        assert not errors_path(output).stat().st_size


def test_another_input_model_or_seed_is_refused(given: Path, output: Path) -> None:
    begun(given, output, "a")
    kept = manifest_path(output).read_bytes()
    with pytest.raises(Changed, match=r"seed: \d+ → 1\n"), open_job(given, output, Wanted(seed=1)):
        pass
    with (
        open_job(given, output, Wanted()) as job,
        pytest.raises(Changed, match=r"model dtype: float32 → bfloat16\nanswers of both .*--accept-changes"),
    ):
        job.begin({**MODEL, "dtype": "bfloat16"})
    write_input(given, "abcd")
    with pytest.raises(Changed, match=r"input rows: 3 → 4\n"), open_job(given, output, Wanted()):
        pass
    assert manifest_path(output).read_bytes() == kept
    assert output.read_bytes() == result("a")


def test_changes_can_be_accepted(given: Path, output: Path) -> None:
    begun(given, output, "a", "z")
    before = read_manifest(manifest_path(output))
    assert before is not None
    write_input(given, "abd")
    with open_job(given, output, Wanted(accept_changes=True)) as job:
        assert pending(job) == "bd"
        assert (job.tally.rows, job.tally.left) == (3, 2)
        now = job.begin({**MODEL, "dtype": "x"})
    assert now == read_manifest(manifest_path(output))
    assert (now.batch, now.seed, now.input.rows, now.model["dtype"]) == (before.batch, before.seed, 3, "x")


def test_without_results_everything_may_change(given: Path, output: Path) -> None:
    begun(given, output)
    write_input(given, "xy")
    with open_job(given, output, Wanted(seed=5)) as job:
        assert job.begin({"model": "other"}).seed == 5


@pytest.mark.parametrize("suffix", ["", ".errors.jsonl"])
def test_what_is_not_ours_is_left_alone(given: Path, output: Path, suffix: str) -> None:
    foreign = output.with_name(output.name + suffix)
    foreign.write_bytes(result("a") + b"no end of line")
    with (
        pytest.raises(BatchError, match=r"is no output of a batch \(there is no out.jsonl.manifest.json\)"),
        open_job(given, output, Wanted()),
    ):
        pass
    assert foreign.read_bytes() == result("a") + b"no end of line"


def test_one_run_at_a_time(given: Path, output: Path) -> None:
    with (
        open_job(given, output, Wanted()),
        pytest.raises(BatchError, match="another `expertmesh batch run`"),
        open_job(given, output, Wanted()),
    ):
        pass


def test_what_cannot_be_opened(given: Path, output: Path, tmp_path: Path) -> None:
    def refused(requests: Path, results: Path) -> str:
        with pytest.raises(BatchError) as caught, open_job(requests, results, Wanted()):
            pass
        return str(caught.value)

    assert refused(given, given).endswith("in.jsonl: is the input")
    assert refused(Path("-"), output) == "-: allowed is a regular file; it is read more than once"
    assert refused(tmp_path, output).endswith("allowed is a regular file; it is read more than once")
    assert refused(tmp_path / "none", output).endswith("none: No such file or directory")
    assert refused(given, tmp_path / "none" / "out").endswith("none/out: No such file or directory")
    assert refused(given, tmp_path).endswith("Is a directory")


def test_a_bad_input_touches_nothing(given: Path, output: Path) -> None:
    given.write_text("nope\n")
    with pytest.raises(BadInput), open_job(given, output, Wanted()):
        pass
    assert not output.exists()


def test_an_input_that_changes_meanwhile(given: Path, output: Path) -> None:
    for names, complaint in {
        "abcd": "line 4: custom_id: 'd' was not there before",
        "abca": "line 4: custom_id: 'a' was not there before",
        "acb": "line 2: custom_id: 'c' was not there before",
        "ab": "has 2 rows; had 3",
    }.items():
        with open_job(write_input(given, "abc"), output, Wanted()) as job:
            write_input(given, names)
            with pytest.raises(BatchError, match=rf"in\.jsonl: was changed while the batch ran: {complaint}"):
                pending(job)
    with open_job(write_input(given, "abc"), output, Wanted()) as job:
        given.write_text("nope\n")
        with pytest.raises(BatchError, match=r"in\.jsonl: was changed while the batch ran: is not JSON"):
            pending(job)


def test_what_is_finished_is_not_passed_over_for_nobody(given: Path, output: Path) -> None:
    begun(given, output, "ab")
    enough = threading.Event()
    with open_job(given, output, Wanted()) as job:
        enough.set()
        assert list(job.pending(enough)) == []


@pytest.mark.parametrize("same_input", [True, False])
def test_what_it_was_begun_with_survives_a_retry_that_is_killed(given: Path, output: Path, same_input: bool) -> None:
    with open_job(given, output, Wanted(seed=7)) as job:
        first = job.begin(MODEL)
        job.errors.append([result(name) for name in "abc"])
    with open_job(given, output, Wanted(retry_failed=True)) as job:
        job.begin(MODEL)
    assert os.path.getsize(output) == os.path.getsize(errors_path(output)) == 0
    if not same_input:
        write_input(given, "xyz")
    with open_job(given, output, Wanted()) as job:
        now = job.begin(MODEL)
    assert (now.seed == 7, now.batch == first.batch) == (same_input, same_input)


def test_a_failed_clear_names_its_file(given: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    begun(given, output, "", "a")
    with open_job(given, output, Wanted(retry_failed=True)) as job:
        monkeypatch.setattr(os, "ftruncate", fail)
        with pytest.raises(BatchError, match=r"out\.jsonl\.errors\.jsonl: Input/output error"):
            job.begin(MODEL)
