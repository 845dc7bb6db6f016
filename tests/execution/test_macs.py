"""MACs by our own formulas: attention by whatever kernel, and a word on what they can't count."""

from __future__ import annotations

import logging

import pytest
import torch
from helpers.flops import flop_counter
from helpers.lazy import Lazy
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from optin_cli.execution.macs import FORMULAS, MacCounter

transformers = Lazy("transformers")

LENGTH, WIDTH, NEURONS, LAYERS, HEADS = 12, 32, 48, 2, 4
IMPLEMENTATIONS = ["eager", "sdpa", "flex_attention"]


def macs(call) -> int:
    with torch.no_grad(), MacCounter() as counter:
        call()
    assert not counter.uncounted
    return counter.total


def attention_block(tokens: int, width: int, neurons: int) -> int:
    """docs/method.md, section 4, for all heads and neurons of one block: 4 s d d + 2 s s d + 2 s d n."""
    return 4 * tokens * width**2 + 2 * tokens**2 * width + 2 * tokens * width * neurons


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_an_encoder_costs_what_the_formula_says(implementation):
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=NEURONS,
        attn_implementation=implementation,
    )
    model = transformers.BertModel(config).eval()
    found = macs(lambda: model(torch.ones(3, LENGTH, dtype=torch.long)))
    assert found == 3 * (LAYERS * attention_block(LENGTH, WIDTH, NEURONS) + WIDTH**2)  # and the pooler


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_causal_decoder_with_grouped_queries(implementation, groups):
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=groups,
        intermediate_size=NEURONS,
        attn_implementation=implementation,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    found = macs(lambda: model(torch.ones(2, LENGTH, dtype=torch.long), use_cache=False))
    shared = WIDTH * groups // HEADS  # columns of keys, and of values
    projections = LENGTH * WIDTH * (2 * WIDTH + 2 * shared)
    block = projections + 2 * LENGTH**2 * WIDTH + 3 * LENGTH * WIDTH * NEURONS
    # the table of rotary angles is a product in some versions of transformers: positions times frequencies
    rotary = LENGTH * WIDTH // HEADS // 2
    assert found - 2 * (LAYERS * block + LENGTH * WIDTH * 50) in (0, rotary, 2 * rotary)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_cross_attention_counts_both_lengths(implementation):
    config = transformers.T5Config(
        vocab_size=50,
        d_model=WIDTH,
        d_kv=8,
        num_heads=HEADS,
        d_ff=NEURONS,
        num_layers=1,
        num_decoder_layers=1,
    )
    config._attn_implementation = implementation
    model = transformers.T5Model(config).eval()
    asked, given_ = 5, LENGTH
    found = macs(
        lambda: model(
            input_ids=torch.ones(2, given_, dtype=torch.long),
            decoder_input_ids=torch.ones(2, asked, dtype=torch.long),
        )
    )
    cross = 2 * asked * WIDTH**2 + 2 * given_ * WIDTH**2 + 2 * asked * given_ * WIDTH
    blocks = attention_block(given_, WIDTH, NEURONS) + attention_block(asked, WIDTH, NEURONS)
    assert found == 2 * (blocks + cross)


def test_a_vision_transformer_is_counted_as_torch_counts_its_eager_form():
    config = transformers.ViTConfig(
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=NEURONS,
        image_size=16,
        patch_size=4,
    )
    image = torch.zeros(2, 3, 16, 16)
    config._attn_implementation = "eager"
    with torch.no_grad(), flop_counter() as counter:
        transformers.ViTModel(config).eval()(image)
    config._attn_implementation = "sdpa"
    assert macs(lambda: transformers.ViTModel(config).eval()(image)) == counter.get_total_flops() // 2


@given(
    batch=st.integers(1, 3),
    groups=st.integers(1, 3),
    times=st.integers(1, 3),
    queries=st.integers(1, 6),
    keys=st.integers(1, 6),
    width=st.integers(1, 9),
    causal=st.booleans(),
)
def test_attention_of_any_shape(batch, groups, times, queries, keys, width, causal):
    heads = groups * times
    query = torch.randn(batch, heads, queries, width)
    key = torch.randn(batch, groups, keys, width)
    found = macs(lambda: scaled_dot_product_attention(query, key, key, is_causal=causal, enable_gqa=True))
    assert found == 2 * batch * heads * queries * keys * width


@pytest.mark.parametrize("grad", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_torchs_own_encoder_layer_counts_the_same_fused_or_not(grad):
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, NEURONS, batch_first=True).eval()
    with grad(), MacCounter() as counter:
        layer(torch.randn(2, LENGTH, WIDTH))
    assert counter.total == 2 * attention_block(LENGTH, WIDTH, NEURONS)


def test_convolutions_grouped_and_transposed():
    image = torch.randn(2, 8, 7, 5)
    assert macs(lambda: nn.Conv2d(8, 4, 3, groups=2)(image)) == 2 * 4 * (5 * 3) * (4 * 9)
    # every one of the 8 x 35 inputs meets a kernel of 2 x 9
    assert macs(lambda: nn.ConvTranspose2d(8, 4, 3, groups=2)(image)) == 2 * 8 * (7 * 5) * (2 * 9)


def test_compiled_code_counts_as_the_code_it_was_made_from():
    layer = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))
    assert macs(lambda: torch.compile(layer)(torch.randn(3, 8))) == 3 * (8 * 16 + 16 * 4)


@torch.library.custom_op("optin_test::product", mutates_args=())
def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a @ b


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: nn.LSTM(8, 4)(torch.randn(3, 2, 8)), "aten."),
        (lambda: product(torch.randn(2, 3), torch.randn(3, 2)), "optin_test.product"),
        (lambda: torch.fft.rfft(torch.randn(8)), "aten._fft_r2c"),
    ],
    ids=["lstm", "an operation of another library", "fft"],
)
def test_what_has_no_formula_is_named(call, name, caplog):
    with torch.no_grad(), MacCounter() as counter:
        call()
    with caplog.at_level(logging.WARNING):
        counter.warn_uncounted()
    assert "too low" in caplog.text
    assert any(found.startswith(name) for found in counter.uncounted)


def test_cheap_operations_are_not_named():
    image = torch.randn(1, 3, 8, 8)
    with torch.no_grad(), MacCounter() as counter:
        nn.BatchNorm2d(3).eval()(image)
        nn.functional.interpolate(image, scale_factor=2, mode="bilinear")
        nn.functional.normalize(image).softmax(1).cumsum(2).topk(2)
        nn.functional.unfold(image, 2)
        torch.linalg.vector_norm(image)
        nn.Embedding(4, 2)(torch.tensor([1]))
    assert not counter.uncounted
    assert counter.total == 0


def test_every_attention_of_torch_has_a_formula():
    names = {
        name.split(".")[0] for name in torch._C._dispatch_get_all_op_names() if name.startswith("aten::")
    }
    attention = {name.removeprefix("aten::") for name in names if "attention" in name}
    kernels = {
        name for name in attention if "backward" not in name and not name.startswith("_fused_sdp_choice")
    }
    made_of_others = {"scaled_dot_product_attention", "_scaled_dot_product_attention_math"}
    assert "_scaled_dot_product_flash_attention_for_cpu" in kernels
    assert not [name for name in kernels - made_of_others if f"aten.{name}" not in FORMULAS]


def test_what_is_compiled_later_is_compiled():
    """The counter has torch run things as written, while it counts and no longer."""
    traced = []

    def backend(module: torch.fx.GraphModule, _: object):
        traced.append(module)
        return module.forward

    layer = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Dropout())
    with MacCounter():
        layer(torch.ones(2, 4))
    torch.compile(layer, backend=backend)(torch.ones(2, 4))
    assert traced
    torch.compiler.reset()
