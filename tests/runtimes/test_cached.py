"""Decoders exported with their cache: a prompt and then token by token, run by onnxruntime alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.exported import checks_of, emptied, in_torch, others
from helpers.lazy import Lazy, needs_onnx
from helpers.models import opened, saved_model

from optin_cli.errors import InputError, OptinError, OutputDiffers, UsageError
from optin_cli.runtimes.cached import expected_in_steps, stepwise
from optin_cli.runtimes.export import ExportSettings, export
from optin_cli.runtimes.opening import open_exported
from optin_cli.runtimes.verify import deviation

needs_onnx()
onnxruntime = Lazy("onnxruntime")
SETTINGS = ExportSettings("onnx", cache=True)
STEPS = 6


@pytest.fixture(
    scope="module", params=["llama", *(pytest.param(n, marks=pytest.mark.slow) for n in ("gpt2", "gemma3"))]
)
def exported(request, tmp_path_factory):
    """(decoder without the heads of a block and the neurons of another, what was exported)."""
    model = opened(emptied(request.param, "language"))
    return model, export(model, SETTINGS, tmp_path_factory.mktemp("cached") / "m.onnx", checks_of)


def test_the_file_generates_as_torch_does(exported):
    """Two prompts, one padded to the left; the logits of every step, with the cache that the step before gave."""
    model, made = exported
    ids = torch.tensor([[5, 7, 6, 9, 4], [0, 0, 8, 5, 11]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    wanted = model.module.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    session = onnxruntime.InferenceSession(str(made.path), providers=["CPUExecutionProvider"])
    past = {
        one.name: np.zeros((2, one.shape[1], 0, one.shape[3]), np.float32)
        for one in session.get_inputs() if one.name.startswith("past_key_values.")
    }  # fmt: skip
    assert list(past)[:2] == ["past_key_values.0.key", "past_key_values.0.value"]
    new, real = ids.numpy(), mask.numpy()
    for step in range(STEPS):
        positions = np.maximum(real.cumsum(-1) - 1, 0)[:, -new.shape[1] :]
        given = {"input_ids": new, "attention_mask": real, "position_ids": positions, **past}
        logits, *present = session.run(None, given)
        torch.testing.assert_close(torch.from_numpy(logits[:, -1]), wanted.logits[step], rtol=1e-4, atol=1e-4)
        past = dict(zip(past, present, strict=True))
        new = wanted.sequences[:, ids.shape[1] + step][:, None].numpy()
        real = np.concatenate([real, np.ones((2, 1), np.int64)], 1)
    assert all(one.shape[2] == ids.shape[1] + STEPS - 1 for one in past.values())
    assert float(torch.stack(wanted.logits).std()) > 1e-3  # not all alike


def test_the_record_names_the_cache_and_a_prompt_is_evaluated(exported):
    model, made = exported
    assert made.facts["inputs"][:3] == ["input_ids", "attention_mask", "position_ids"]
    assert made.facts["outputs"][:2] == ["logits", "present.0.key"]
    assert made.facts["cache"]["past_key_values.0.key"][0] == 1  # no head is left: one that nothing reads
    found = open_exported(str(made.path))
    for inputs in others(model):
        real = inputs["attention_mask"].bool()
        ours, theirs = found.full_output(inputs), in_torch(model, inputs)
        torch.testing.assert_close(ours[real], theirs[real], rtol=1e-3, atol=1e-4)
    again = export(model, SETTINGS, made.path, lambda _: pytest.fail("it is there"))
    assert again.reused
    with pytest.raises(OutputDiffers):
        export(model, ExportSettings("onnx"), made.path, checks_of)


def test_a_file_that_forgets_is_found_out(exported):
    model, made = exported
    checks, cache = checks_of(model), made.facts["cache"]
    session = open_exported(str(made.path)).runtime.session

    def forgets(inputs):
        return session({k: 0 * v if k.startswith("past") else v for k, v in inputs.items()})

    wanted = expected_in_steps(model, checks)
    assert deviation(stepwise(session, cache), wanted, checks, "float32").largest < 1e-4
    with pytest.raises(OptinError, match="deviates"):
        deviation(stepwise(forgets, cache), wanted, checks, "float32")


def test_what_has_no_cache_is_refused(tmp_path):
    model = opened(saved_model("bert"))
    with pytest.raises(InputError, match="no cache of keys and values"):
        export(model, SETTINGS, tmp_path / "m.onnx", checks_of)
    with pytest.raises(UsageError, match="is for onnx"):
        export(model, ExportSettings("torch", cache=True), tmp_path / "m.pt2", checks_of)
