"""What is computed again is the same again, and what is kept is less."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mpt.model.cache import Cache
from mpt.model.network import MPT
from mpt.recipe.activations import Recompute
from mpt.recipe.model import Model
from mpt.state import Loss
from tests.model.test_network import OPTIONS, model, some_tokens
from tests.tiny_model import TINY

BACKENDS = ("sdpa", "blocks")


def gradients(
    cfg: Model, backend: str, how: Recompute, *, compiled: bool = False
) -> tuple[list[Tensor], int]:
    """The gradients of one step, and the bytes that its forward pass kept for them."""
    torch.manual_seed(0)
    network = MPT(cfg, backend, recompute=how)  # type: ignore[arg-type]
    if compiled:
        for block in network.transformer.blocks:
            block.compile(fullgraph=True, backend="aot_eager")
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    of_the_model = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in of_the_model:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    torch.manual_seed(1)  # of dropout
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = network(some_tokens(cfg, 4), some_tokens(cfg, 4).roll(1))
    assert isinstance(loss, Loss)
    return list(torch.autograd.grad(loss.objective, list(network.parameters()))), sum(kept.values())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("option", ["released", "shared keys", "glu", "rope", "window"])
def test_gradients_are_the_same_bit_for_bit_however_little_is_kept(
    option: str, backend: str
) -> None:
    cfg = replace(model(**OPTIONS[option]), attn_pdrop=0.2, resid_pdrop=0.2)
    expected, _ = gradients(cfg, backend, "none")
    for how in ("selective", "full"):
        found, _ = gradients(cfg, backend, how)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_full_keeps_little_more_than_the_input_of_each_block(backend: str) -> None:
    cfg = replace(TINY, n_layers=4)
    everything, least = (gradients(cfg, backend, how)[1] for how in ("none", "full"))
    inputs = cfg.n_layers * 4 * cfg.max_seq_len * cfg.d_model * 4  # blocks x samples x ... x fp32
    assert least < 2.5 * inputs < everything / 3


class Counter(TorchDispatchMode):
    """Counts how often each operation runs."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = str(func.overloadpacket)
        self.ran[name] = self.ran.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", BACKENDS)
def test_selective_makes_activations_again_but_no_matrix_product(backend: str) -> None:
    ran: dict[str, dict[str, int]] = {}
    for how in ("none", "selective", "full"):
        with Counter() as counter:
            gradients(TINY, backend, how)
        ran[how] = counter.ran
    products, activations, blocks = "aten.mm", "aten.gelu", TINY.n_layers
    assert ran["selective"][products] == ran["none"][products]
    # The last one of a block is not made again: nobody needs what it gives.
    assert ran["full"][products] == ran["none"][products] + 3 * blocks
    for how in ("selective", "full"):
        assert ran[how][activations] == ran["none"][activations] + blocks


@pytest.mark.parametrize("backend", [*BACKENDS, "wide"])
@pytest.mark.parametrize("how", ["selective", "full"])
@pytest.mark.filterwarnings("ignore")  # torch warns of what selective recomputation may not hold
def test_a_compiled_block_makes_the_same_again(how: Recompute, backend: str) -> None:
    cfg = replace(TINY, n_layers=1)
    torch._dynamo.reset()  # what other tests compiled counts towards a limit
    expected, _ = gradients(cfg, "sdpa", "none")
    found, _ = gradients(cfg, backend, how, compiled=True)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_a_network_in_training_takes_no_cache() -> None:
    network, tokens = MPT(TINY), some_tokens(TINY)
    cache = Cache(TINY, 2, TINY.max_seq_len, tokens.device, torch.float32)
    with pytest.raises(AssertionError, match="a cache is for reading"):
        network(tokens, cache=cache)
