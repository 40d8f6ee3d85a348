from __future__ import annotations

from array import array

import numpy as np
import pytest

from actors.engine.cells import cells


def test_positions_of_each_row_s_ids_row_after_row() -> None:
    assert cells("f", [(3, 0, 3), (), [9]], 10).tolist() == [3, 0, 3, 29]
    assert cells("f", [array("q", (1, 2)), np.array([5]), {4}], 10).tolist() == [1, 2, 15, 24]


def test_nothing_is_an_empty_array_of_positions() -> None:
    assert cells("f", [(), frozenset()], 10).dtype == np.int64
    assert cells("f", [(), frozenset()], 10).tolist() == []
    assert cells("f", [], 10).tolist() == []


@pytest.mark.parametrize("wrong", [-1, 10, 2**40])
def test_an_id_outside_the_vocabulary_is_refused(wrong: int) -> None:
    with pytest.raises(ValueError, match=f"banned_ids: token id {wrong}, allowed are 0 to 9"):
        cells("banned_ids", [(0,), (9, wrong)], 10)
