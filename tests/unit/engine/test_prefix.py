from __future__ import annotations

from itertools import combinations

from actors.engine.prefix import PrefixKeys, block_key, root_key


def test_no_two_tenants_and_adapters_share_a_root() -> None:
    names = ["", "a", "ab", "b", "a\0", "\0a", "é", "\ud800"]
    roots = [root_key(tenant, adapter) for tenant in names for adapter in names]
    assert len(set(roots)) == len(names) ** 2
    assert all(len(root) == 16 for root in roots)


def test_a_key_says_all_tokens_from_the_first_on() -> None:
    texts = [(1, 2, 3, 4), (1, 2, 3, 5), (2, 2, 3, 4), (1, 2, 4, 3), (1 << 40, 2, 3, 4)]
    keys = [PrefixKeys("t", "", 2).first(2, text) for text in texts]
    for (a, first), (b, second) in combinations(zip(texts, keys, strict=True), 2):
        assert (first[0] == second[0]) == (a[:2] == b[:2])
        assert first[1] != second[1]


def test_each_block_is_hashed_once_as_the_sequence_grows() -> None:
    tokens = list(range(10))
    keys = PrefixKeys("t", "x", 3)
    first = keys.first(2, tokens)
    tokens[:6] = [-1] * 6  # would be seen if they were read again
    tokens += [10, 11]
    assert keys.first(4, tokens)[:2] == first
    assert keys.first(1, []) == first[:1]
    assert keys.first(3, tokens)[2] == block_key(first[1], [6, 7, 8])
