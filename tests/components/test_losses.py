"""The losses are torch's and torchtune's own, except where those are not finite."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torchtune import training
from torchtune.modules import loss as host

from flash_plugin.components.losses import CEWithChunkedOutputLoss, CrossEntropyLoss
from tests.tolerances import assert_close

VOCAB = 11
CHUNKS = 4
IGNORED = -100


def batch(dtype: torch.dtype = torch.float32, ignored: float = 0.3) -> tuple[Tensor, Tensor]:
    """Logits ``[b, s, vocab]`` with a gradient, and labels ``[b, s]``."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 24, VOCAB, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(VOCAB, (2, 24), generator=generator)
    return logits, labels.masked_fill(torch.rand(2, 24, generator=generator) < ignored, IGNORED)


def call(loss: nn.Module, logits: Tensor, labels: Tensor) -> Tensor:
    """As recipes do."""
    if loss.__class__.__name__ == "CEWithChunkedOutputLoss":
        return loss(list(logits.chunk(loss.num_output_chunks, dim=1)), labels)
    return loss(logits.reshape(-1, VOCAB), labels.reshape(-1))


PAIRS = [
    (CrossEntropyLoss(), nn.CrossEntropyLoss()),
    (CrossEntropyLoss(label_smoothing=0.1), nn.CrossEntropyLoss(label_smoothing=0.1)),
    (CEWithChunkedOutputLoss(CHUNKS), host.CEWithChunkedOutputLoss(CHUNKS)),
]
OURS = pytest.mark.parametrize("ours", [pair[0] for pair in PAIRS], ids=["plain", "smoothed", "chunked"])


@pytest.fixture
def gloo(tmp_path: object) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("ours", "theirs"), PAIRS, ids=["plain", "smoothed", "chunked"])
def test_bit_for_bit_the_loss_it_extends(ours: nn.Module, theirs: nn.Module, dtype: torch.dtype) -> None:
    results = []
    for loss in (ours, theirs):
        logits, labels = batch(dtype)
        value = call(loss, logits, labels)
        value.backward()
        results.append((value.detach(), logits.grad))
    assert results[0][0].dtype == results[1][0].dtype
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize(("ours", "theirs"), PAIRS, ids=["plain", "smoothed", "chunked"])
def test_recipes_take_it_for_the_one_it_extends(ours: nn.Module, theirs: nn.Module) -> None:
    assert isinstance(ours, type(theirs))
    assert type(ours).__name__ == type(theirs).__name__
    assert ours.ignore_index == theirs.ignore_index == IGNORED


@OURS
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run(ours: nn.Module, value: float) -> None:
    loss = type(ours)()
    logits, labels = batch()
    assert call(loss, logits, labels).isfinite()
    # An infinite logit that is not the label's makes an infinite loss; any other makes NaN.
    broken = logits.detach().clone()
    broken[0, 3, (labels[0, 3] + 1) % VOCAB] = value
    labels[0, 3] = labels[0, 3].clamp(min=0)
    with pytest.raises(ValueError, match=r"the loss \((nan|inf), in batch 2 of this run\) must be finite.*lower .*lr"):
        call(loss, broken, labels)


@OURS
def test_a_batch_without_labels_leaves_the_weights_alone(ours: nn.Module) -> None:
    """Even where nothing else is in the step, whose gradients the recipe divides by the number of labels."""
    logits, labels = batch(ignored=1.0)
    weight = nn.Parameter(torch.ones(VOCAB))
    loss = call(ours, logits * weight, labels)
    assert loss == 0
    assert call(PAIRS[0][1], logits, labels).isnan(), "what the stock loss is"
    number = (labels != ours.ignore_index).sum()
    (loss * number).backward()
    training.scale_grads(nn.ParameterList([weight]), 1 / number)
    optimizer = torch.optim.AdamW([weight], lr=1.0, fused=True)
    torch.nn.utils.clip_grad_norm_([weight], 1.0)
    optimizer.step()
    assert torch.equal(weight, torch.ones(VOCAB))


@OURS
def test_with_several_processes_such_a_batch_has_gradients_of_zero(ours: nn.Module, gloo: None) -> None:
    logits, labels = batch(ignored=1.0)
    weight = nn.Parameter(torch.ones(VOCAB))
    loss = call(ours, logits * weight, labels)
    assert loss == 0
    loss.backward()
    assert weight.grad is not None, "or the other processes would wait for it"
    assert torch.equal(weight.grad, torch.zeros(VOCAB))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo's own, of views
@OURS
def test_compiled_as_recipes_do(ours: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the chunked loss they compile the cross-entropy of a chunk, of any other (in distillation) the whole."""
    monkeypatch.setenv("TORCH_COMPILE_BACKEND", "aot_eager")
    loss = type(ours)()
    compiled = training.compile_loss(loss, verbose=False)
    assert compiled.ignore_index == IGNORED
    logits, labels = batch()
    pieces = [logits.detach().reshape(-1, VOCAB)]
    chunked = isinstance(ours, CEWithChunkedOutputLoss)
    if chunked:
        pieces = list(logits.detach().chunk(8, dim=1))

    def call_compiled(labels: Tensor, factor: float = 1.0) -> Tensor:
        scaled = [(piece * factor).requires_grad_() for piece in pieces]
        return compiled(scaled, labels) if chunked else compiled(scaled[0], labels.flatten())

    value = call_compiled(labels)
    value.backward()
    assert_close(value, call(type(ours)(), logits, labels), "pair_fp32")
    assert call_compiled(torch.full_like(labels, IGNORED)) == 0
    with pytest.raises(ValueError, match="in batch 3 of this run"):
        call_compiled(labels, factor=math.nan)


@pytest.mark.parametrize(
    ("component", "arguments", "sentence"),
    [
        (CrossEntropyLoss, {"reduction": "sum"}, r"reduction \('sum'\) is not an argument of CrossEntropyLoss"),
        (CEWithChunkedOutputLoss, {"num_chunks": 2}, r"num_chunks \(2\) is not .*did you mean num_output_chunks\?"),
        (CEWithChunkedOutputLoss, {"num_output_chunks": 0}, r"num_output_chunks \(0\) must be a positive integer"),
    ],
)
def test_wrong_arguments(component: type[nn.Module], arguments: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        component(**arguments)
