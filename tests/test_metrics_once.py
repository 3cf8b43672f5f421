"""What is kept between evaluations: computed once, bounded by number and by bytes."""

from collections import OrderedDict

import pytest
import torch

from sae.metrics.once import once


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch: pytest.MonkeyPatch) -> OrderedDict:
    kept: OrderedDict = OrderedDict()
    monkeypatch.setattr("sae.metrics.once._kept", kept)
    return kept


def test_an_answer_is_computed_once_and_its_dictionaries_may_be_changed() -> None:
    calls: list[int] = []

    def compute() -> list[dict[str, float]]:
        calls.append(1)
        return [{"mcc": 1.0}]

    once("key", compute)[0]["mcc"] = 0.0
    assert once("key", compute) == [{"mcc": 1.0}]
    assert len(calls) == 1


def test_the_oldest_answers_make_room(monkeypatch: pytest.MonkeyPatch, nothing_kept: OrderedDict) -> None:
    monkeypatch.setattr("sae.metrics.once.MAX_BYTES", 1000)
    for key in range(5):
        once(key, lambda: ({"a": 1.0}, torch.zeros(50)))  # 200 bytes in a tuple: where tensors lie must not matter
    assert list(nothing_kept) == [0, 1, 2, 3, 4]
    once(5, lambda: torch.zeros(50))
    assert list(nothing_kept) == [1, 2, 3, 4, 5]
    once(6, lambda: torch.zeros(1000))  # larger than all room: it is kept alone
    assert list(nothing_kept) == [6]
    monkeypatch.setattr("sae.metrics.once.MAX_KEPT", 2)
    for key in "ab":
        once(key, lambda: 0.0)
    assert list(nothing_kept) == ["a", "b"]
