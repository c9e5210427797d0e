"""What comes back from `unpack`: every token in its place, in as few calls as its padding allows."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers.modeling_outputs import BaseModelOutput

from sft_plugins.errors import ContaminationError
from sft_plugins.packing.isolation.backends.unpack import Unpack, _buckets, _taken
from sft_plugins.packing.isolation.boundaries import Boundaries
from sft_plugins.packing.isolation.forward import install
from testkit.isolated import LENGTHS
from testkit.isolation_oracle import (
    make_documents,
    packed_batch,
)
from testkit.tiny_models import build

# --- what comes back --------------------------------------------------------------------------------------------


def test_hidden_states_and_router_logits_are_packed_and_the_auxiliary_loss_counts_no_padding() -> None:
    tiny = build("mixtral")
    documents = make_documents(LENGTHS, tiny.vocab_size)
    options = {"output_hidden_states": True, "output_router_logits": True}
    with torch.no_grad():
        alone = [tiny.model(input_ids=d[None], use_cache=False, **options) for d in documents]
        install(tiny.model, Unpack())
        packed = tiny.model(**packed_batch(documents), **options)
    assert packed.past_key_values is None
    for layer, states in enumerate(packed.hidden_states):
        expected = torch.cat([out.hidden_states[layer] for out in alone], dim=1)
        torch.testing.assert_close(states, expected, atol=1e-5, rtol=1e-5)
    for layer, logits in enumerate(packed.router_logits):
        expected = torch.cat([out.router_logits[layer] for out in alone])
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    config = tiny.model.config
    routed = tuple(torch.cat(layers) for layers in zip(*[out.router_logits for out in alone], strict=True))
    expected = load_balancing_loss_func(routed, config.num_local_experts, config.num_experts_per_tok)
    torch.testing.assert_close(packed.aux_loss, expected)


def test_tuples_come_back_as_tuples() -> None:
    tiny = build("llama")
    documents = make_documents(LENGTHS, tiny.vocab_size)
    install(tiny.model, Unpack())
    with torch.no_grad():
        named = tiny.model(**packed_batch(documents)).logits
        plain = tiny.model(**packed_batch(documents), return_dict=False)[0]
    assert torch.equal(named, plain)


def test_attention_weights_have_no_packed_form() -> None:
    tiny = build("gpt_oss")
    install(tiny.model, Unpack())
    with pytest.raises(ContaminationError, match="no packed form") as error:
        tiny.model(**packed_batch(make_documents([3, 4], tiny.vocab_size)), output_attentions=True)
    assert error.value.code == "output_attentions"


def _echo(lengths: list[int], **options: Any) -> tuple[list[torch.Size], BaseModelOutput]:
    """Unpack a stand-in backbone that answers with its own input, in every form that outputs take."""
    shapes: list[torch.Size] = []

    def backbone(input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **_: Any) -> BaseModelOutput:
        shapes.append(input_ids.shape)
        states = input_ids[..., None].expand(-1, -1, 3)
        streams = torch.cat([states, -states], dim=1)
        flat = input_ids.reshape(-1, 1).expand(-1, 5)
        pooled = torch.zeros(input_ids.shape[0] + 1, 7)
        return BaseModelOutput(last_hidden_state=states, hidden_states=(streams, flat, pooled, SimpleNamespace()))

    boundaries = Boundaries(np.asarray(lengths))
    row = torch.arange(boundaries.tokens)[None]
    return shapes, Unpack(**options).run(backbone, {"input_ids": row}, boundaries)


@pytest.mark.parametrize("options", [{}, {"padding": False}])
def test_every_token_comes_back_in_its_place(options: dict[str, bool]) -> None:
    generator = np.random.default_rng(0)
    for _ in range(50):
        lengths = generator.integers(2, 40, size=generator.integers(1, 30)).tolist()
        _, out = _echo(lengths, **options)
        row = torch.arange(sum(lengths))
        assert torch.equal(out.last_hidden_state, row[None, :, None].expand(1, -1, 3))
        streams, flat, pooled, cache = out.hidden_states
        assert torch.equal(streams, torch.cat([row, -row])[None, :, None].expand(1, -1, 3))
        assert torch.equal(flat, row[:, None].expand(-1, 5))
        assert pooled is None
        assert cache is None


@pytest.mark.parametrize(
    "lengths", [[2, 6, 2, 3], [1, 6, 1, 3], [1, 1, 1]], ids=["longer", "some of one token", "of one token"]
)
@pytest.mark.parametrize("options", [{}, {"padding": False}])
def test_one_number_per_token_comes_back_in_its_place(options: dict[str, bool], lengths: list[int]) -> None:
    def backbone(input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=input_ids)

    row = torch.arange(sum(lengths))[None]
    out = Unpack(**options).run(backbone, {"input_ids": row}, Boundaries(np.array(lengths)))
    assert torch.equal(out.last_hidden_state, row)


def test_positions_of_several_axes_go_with_their_tokens() -> None:
    """Time, height and width before the rows, as models that see images have them."""

    def backbone(
        input_ids: torch.Tensor, position_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=torch.stack([input_ids, *position_ids], dim=-1))

    rows = torch.arange(14).view(2, 7)
    axes = torch.stack([rows + 100, rows + 200, rows + 300])
    given = {"input_ids": rows, "position_ids": axes}
    out = Unpack().run(backbone, given, Boundaries(np.array([4, 3, 2, 5]), rows=2))
    assert torch.equal(out.last_hidden_state, torch.stack([rows, *axes], dim=-1))


def test_several_rows_come_back_as_rows() -> None:
    def backbone(input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=input_ids[..., None].float())

    ids = torch.arange(14).view(2, 7)
    boundaries = Boundaries(np.array([2, 5, 3, 1, 3]), rows=2)
    assert torch.equal(Unpack().run(backbone, {"input_ids": ids}, boundaries).last_hidden_state[..., 0], ids.float())


def test_ranks_with_sharded_weights_make_equally_many_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call gathers them from all ranks: one rank calling once more would wait for ever."""
    assert len(_echo([90, 1, 1])[0]) == 2
    monkeypatch.setattr("sft_plugins.packing.isolation.backends.unpack._gathers_weights", lambda _: True)
    assert _echo([90, 1, 1])[0] == [(3, 90)]
    with pytest.raises(ContaminationError, match="one length at a time, and its weights are sharded") as error:
        _echo([90, 1, 1], padding=False)
    assert error.value.code == "sharded"


def test_a_third_more_slots_than_tokens_at_most_in_logarithmically_many_calls() -> None:
    generator = np.random.default_rng(0)
    for _ in range(50):
        lengths = np.minimum(generator.lognormal(3, 2, size=generator.integers(1, 200)).astype(int) + 1, 2000)
        buckets = _buckets(lengths, padding=True)
        assert sorted(np.concatenate(buckets).tolist()) == list(range(lengths.size))
        assert sum(len(bucket) * lengths[bucket].max() for bucket in buckets) <= 4 / 3 * lengths.sum()
        assert len(buckets) <= np.log(lengths.max()) / np.log(4 / 3) + 1


def test_buckets_by_hand() -> None:
    as_lists: Callable[[Any], list[list[int]]] = lambda buckets: [bucket.tolist() for bucket in buckets]  # noqa: E731
    assert as_lists(_buckets(np.array([9, 2, 8, 1, 1]), padding=True)) == [[0, 2], [1, 3], [4]]
    assert as_lists(_buckets(np.array([9, 2, 8, 2, 9]), padding=False)) == [[0, 4], [2], [1, 3]]
    many = np.tile([2, 1, 3], 100)  # of one length in their order: the same call on every machine
    assert as_lists(_buckets(many, padding=False)) == [np.flatnonzero(many == n).tolist() for n in (3, 2, 1)]


def test_without_padding_every_call_holds_documents_of_one_length() -> None:
    shapes, _ = _echo([4, 2, 4, 3, 2], padding=False)
    assert shapes == [(2, 4), (1, 3), (2, 2)]


def test_what_holds_one_value_per_token_is_put_in_order_and_nothing_else() -> None:
    index, four = torch.tensor([3, 1, 0, 2]), torch.arange(4)
    flat, states, streams = (
        four[:, None] * torch.ones(3),
        four[None, :, None] * torch.ones(1, 4, 2),
        torch.ones(2, 1, 4),
    )
    found = _taken({"flat": flat, "states": (states, [streams * four]), "pooled": torch.arange(3)}, index, 4)
    assert found["flat"][:, 0].tolist() == found["states"][0][0, :, 0].tolist() == index.tolist()
    assert found["states"][1][0][0, 0].tolist() == index.tolist()
    assert found["pooled"].tolist() == [0, 1, 2]
