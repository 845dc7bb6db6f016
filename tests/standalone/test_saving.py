"""A pruned model saved by whoever holds it opens again, with optin and without, and is pruned again."""

from __future__ import annotations

import copy
import json
import pickle
import threading

import pytest
import torch
from helpers.data import tiny_text_csv
from helpers.lazy import Lazy
from helpers.models import saved_model, shared_model
from helpers.pruning import data_for, rank, sliced_copy
from helpers.runs import outputs, random_inputs
from torch import nn

import optin_cli as optin
from optin_cli.artefacts.pruned import read_pruned
from optin_cli.errors import InputError
from optin_cli.loading.checkpoint import open_model
from optin_cli.loading.from_module import copy_of
from optin_cli.pruning.apply import apply
from optin_cli.selection.select import select

transformers = Lazy("transformers")

KEEP = {
    "blocks.0.heads": [],
    "blocks.1.heads": [1, 3],
    "blocks.1.neurons": [5, 6, 60],
    "blocks.2.neurons": [],
}


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """A pruned BERT with an empty sublayer of each kind. Only for reading."""
    folder = tmp_path_factory.mktemp("half") / "half"
    sliced_copy(saved_model("bert"), folder, KEEP)
    return folder


@pytest.fixture(autouse=True, scope="module")
def modules(tmp_path_factory):
    """transformers copies remote code to a cache, and imports it from there."""
    folder = str(tmp_path_factory.mktemp("modules"))
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", folder)
        monkeypatch.syspath_prepend(folder)
        yield


def logits(module: nn.Module) -> torch.Tensor:
    model = shared_model("bert")
    return outputs(model, module.eval(), random_inputs(model))


def without_optin(folder) -> nn.Module:
    return transformers.AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)


def test_without_trust_the_message_names_it(half):
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        transformers.AutoModelForSequenceClassification.from_pretrained(half)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        transformers.AutoModel.from_pretrained(half)


@pytest.mark.parametrize("trust", [True, None])
def test_the_tokenizer_opens(half, trust):
    dense = transformers.AutoTokenizer.from_pretrained(saved_model("bert"))
    found = transformers.AutoTokenizer.from_pretrained(half, trust_remote_code=trust)
    assert type(found) is type(dense) and found.get_vocab() == dense.get_vocab()


def test_other_classes_have_the_encoder(half):
    """Paths of a classifier are not those of its encoder."""
    encoder = transformers.AutoModel.from_pretrained(half, trust_remote_code=True)
    expected = without_optin(half).base_model
    inputs = random_inputs(shared_model("bert"))
    with torch.inference_mode():
        assert torch.equal(
            encoder.eval()(**inputs).last_hidden_state, expected.eval()(**inputs).last_hidden_state
        )
    drawn = transformers.AutoModelForSequenceClassification.from_config(
        encoder.config, trust_remote_code=True
    )
    assert [p.shape for p in drawn.parameters()] == [p.shape for p in without_optin(half).parameters()]


def damage(half, folder, module: str, name: str, size):
    from shutil import copytree

    copytree(half, folder)
    record = json.loads((folder / "optin.json").read_text())
    record["resized"]["sizes"].setdefault(module, {})[name] = size
    (folder / "optin.json").write_text(json.dumps(record))
    return folder


QUERY = "bert.encoder.layer.1.attention.self.query"


@pytest.mark.parametrize(
    ("module", "name", "size"),
    [
        (QUERY, "weight", [10**12, 32]),
        (QUERY, "weight", [8, 32]),
        (QUERY, "out_features", 10**12),
        (QUERY, "out_features", -1),
        (QUERY, "out_features", "8"),
        (QUERY, "forward", 3),
        ("bert.encoder.layer.9", "x", 3),
    ],
)
def test_sizes_that_are_not_those_of_the_weights_are_refused_by_name(half, tmp_path, module, name, size):
    folder = damage(half, tmp_path / "m", module, name, size)
    for opens in (without_optin, optin.load):
        with pytest.raises((ValueError, InputError), match=module):
            opens(folder)


def test_a_directory_without_its_record_says_so(half, tmp_path):
    folder = damage(half, tmp_path / "m", QUERY, "out_features", 1)
    (folder / "optin.json").unlink()
    for opens in (without_optin, optin.load):
        with pytest.raises((OSError, InputError), match=r"optin\.json"):
            opens(folder)


def test_a_directory_of_an_older_version_opens_and_is_saved_as_a_new_one(half, tmp_path):
    """They had a stock config and no list of sizes."""
    folder = damage(half, tmp_path / "m", QUERY, "out_features", 16)
    record, config = (json.loads((folder / name).read_text()) for name in ("optin.json", "config.json"))
    del record["resized"], config["auto_map"]
    (folder / "optin.json").write_text(json.dumps(record | {"schema_version": 2}))
    (folder / "config.json").write_text(json.dumps(config | {"model_type": config.pop("base_model_type")}))
    (folder / "modeling_optin.py").unlink()
    module = optin.load(folder)
    assert torch.equal(logits(module), logits(optin.load(half)))
    module.save_pretrained(tmp_path / "new")
    assert read_pruned(tmp_path / "new").resized == read_pruned(half).resized
    torch.testing.assert_close(logits(without_optin(tmp_path / "new")), logits(module))


@pytest.mark.parametrize("opens", [without_optin, optin.load], ids=["transformers", "optin"])
def test_a_saved_model_opens_and_is_pruned_again(half, tmp_path, opens):
    module = opens(half)
    with torch.no_grad():
        module.classifier.bias += 1
    for number in (1, 2):  # saved, and saved once more by whoever opened it
        module.save_pretrained(tmp_path / f"tuned{number}")
        transformers.AutoTokenizer.from_pretrained(half).save_pretrained(tmp_path / f"tuned{number}")
        again = [without_optin(tmp_path / f"tuned{number}"), optin.load(tmp_path / f"tuned{number}")]
        for other in again:
            torch.testing.assert_close(logits(other), logits(module))
        module = again[0]
    model = open_model(str(tmp_path / "tuned2"))
    mask = select(rank(model, tmp_path), 0.1)
    apply(model, mask, tmp_path / "third")
    first, third = read_pruned(half), read_pruned(tmp_path / "third")
    assert third.kept == {name: [first.kept[name][unit] for unit in kept] for name, kept in mask.keep.items()}
    assert third.dense == first.dense
    torch.testing.assert_close(
        logits(without_optin(tmp_path / "third")), logits(optin.load(tmp_path / "third"))
    )


def test_a_module_in_memory_is_pruned_again(half, tmp_path):
    """And what comes of it saves itself, written by optin or not."""
    model = optin.open_model(optin.load(half), processor=transformers.AutoTokenizer.from_pretrained(half))
    mask = select(rank(model, tmp_path), 0.1)
    small = optin.apply(model, mask, data_for(model), compensate="none")
    small.module.save_pretrained(tmp_path / "m")
    first, then = read_pruned(half), read_pruned(tmp_path / "m")
    assert then.kept == {name: [first.kept[name][unit] for unit in kept] for name, kept in mask.keep.items()}
    torch.testing.assert_close(logits(without_optin(tmp_path / "m")), logits(small.module))
    torch.testing.assert_close(logits(optin.load(tmp_path / "m")), logits(small.module))


def test_a_model_pruned_in_place_saves_itself(tmp_path):
    dense = copy_of(shared_model("bert")).module
    model = optin.open_model(dense, processor=transformers.AutoTokenizer.from_pretrained(saved_model("bert")))
    mask = select(rank(model, tmp_path), 0.5)
    optin.apply(model, mask, data_for(model), compensate="none", inplace=True)
    dense.save_pretrained(tmp_path / "m")
    torch.testing.assert_close(logits(without_optin(tmp_path / "m")), logits(dense))


def test_trainer_trains_it_and_saves_it(half, tmp_path):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    inputs = random_inputs(shared_model("bert"), batch=8)
    rows = [
        {"labels": i % 2, **{key: value[i] for key, value in inputs.items()}} for i in range(8)
    ]  # fmt: skip
    module = optin.load(half)
    before = logits(module)
    options = TrainingArguments(
        tmp_path / "run",
        max_steps=2,
        save_steps=1,
        learning_rate=0.1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(module, options, train_dataset=rows)
    trainer.train()
    trainer.save_model(tmp_path / "tuned")
    assert (logits(module) - before).abs().max() > 1e-3
    for folder in (tmp_path / "tuned", tmp_path / "run" / "checkpoint-2"):
        for opens in (without_optin, optin.load):
            torch.testing.assert_close(logits(opens(folder)), logits(module))


def test_peft_trains_adapters_of_it(half, tmp_path):
    peft = pytest.importorskip("peft")
    module = optin.load(half)
    before = logits(module)
    lora = peft.get_peft_model(module, peft.LoraConfig(r=2, init_lora_weights=False, task_type="SEQ_CLS"))
    loss = lora(**random_inputs(shared_model("bert")), labels=torch.tensor([0, 1, 0])).loss
    loss.backward()
    torch.optim.SGD([p for p in lora.parameters() if p.requires_grad], 0.1).step()
    lora.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(optin.load(half), tmp_path / "adapter")
    torch.testing.assert_close(logits(again), logits(lora))
    lora.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert (logits(module) - before).abs().max() > 1e-3
    for opens in (without_optin, optin.load):
        torch.testing.assert_close(logits(opens(tmp_path / "merged")), logits(module), rtol=1e-4, atol=1e-5)


# what users do with a module: on a model with empty sublayers, selected inputs, or merged tokens


@pytest.fixture(scope="module", params=["bert", "mpnet", "gpt2", "vit"])
def loaded(request, tmp_path_factory):
    """(open dense model, loaded pruned module). Only for reading."""
    dense, folder = shared_model(request.param), tmp_path_factory.mktemp("used") / "m"
    sliced_copy(saved_model(request.param), folder, KEEP, [2, 1] if request.param == "vit" else ())
    return dense, optin.load(folder)


def test_a_copy_runs_on_its_own(loaded):
    dense, module = loaded
    inputs = random_inputs(dense)
    expected = outputs(dense, module, inputs)
    module(**inputs)  # with gradients: nothing of a pass may stay behind that can't be copied
    copied = copy.deepcopy(module)
    with torch.no_grad():
        next(copied.parameters()).zero_()
    assert not torch.equal(outputs(dense, copied, inputs), expected)
    assert torch.equal(outputs(dense, module, inputs), expected)
    copied.load_state_dict(module.state_dict())
    assert torch.equal(outputs(dense, copied, inputs), expected)
    assert type(pickle.loads(pickle.dumps(module.config))) is type(module.config)


def test_threads_run_replicas_of_it(loaded):
    """As DataParallel does: replicas share the hooks, each runs its part of a batch in a thread of its own."""
    dense, module = loaded
    if dense.family.name == "gpt2":
        pytest.skip("replicas have no parameters, which the dense GPT-2 of transformers asks for its dtype")
    batches = [random_inputs(dense, seed=seed) for seed in range(4)]
    expected = [outputs(dense, module, batch) for batch in batches]
    found: dict[int, list[torch.Tensor]] = {}

    def run(number: int) -> None:
        replica = replicated(module)
        found[number] = [outputs(dense, replica, batches[number]) for _ in range(5)]

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(4):
        assert all(torch.equal(one, expected[number]) for one in found[number])
    inputs = random_inputs(dense)
    with torch.no_grad():
        assert nn.DataParallel(module)(**inputs).keys() == module(**inputs).keys()


def replicated(module: nn.Module) -> nn.Module:
    """A replica as torch.nn.parallel.replicate makes it, on the same device."""
    parts = dict(module.named_modules())
    copies = {path: part._replicate_for_data_parallel() for path, part in parts.items()}
    for path, part in parts.items():
        for name, child in part._modules.items():
            if child is not None:
                copies[path]._modules[name] = copies[f"{path}.{name}".lstrip(".")]
        for name, tensor in (*part._parameters.items(), *part._buffers.items()):
            if tensor is not None:
                setattr(copies[path], name, tensor)
    return copies[""]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_it_runs_in_half_precision(loaded, dtype):
    dense, module = loaded
    inputs = random_inputs(dense)
    half = {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}
    found = outputs(dense, copy.deepcopy(module).to(dtype), half)
    expected = outputs(dense, module, inputs)
    assert (found - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.parametrize(
    "name", ["bert", *(pytest.param(n, marks=pytest.mark.slow) for n in ("mpnet", "gpt2"))]
)
def test_it_compiles(name, tmp_path):
    dense, module = shared_model(name), sliced_copy(saved_model(name), tmp_path / "m", KEEP).module
    inputs = random_inputs(dense)
    compiled = torch.compile(copy.deepcopy(module), backend="eager")
    torch.testing.assert_close(outputs(dense, compiled, inputs), outputs(dense, module, inputs))


def test_pipelines_run_it(half, tmp_path):
    module = optin.load(half)
    texts = tiny_text_csv(tmp_path).read_text().splitlines()[1:4]
    held = transformers.pipeline(
        "text-classification", model=module, tokenizer=transformers.AutoTokenizer.from_pretrained(half)
    )
    named = transformers.pipeline("text-classification", model=str(half), trust_remote_code=True)
    for ours, theirs in zip(held(texts), named(texts), strict=True):
        assert ours["label"] == theirs["label"] and ours["score"] == pytest.approx(theirs["score"], abs=1e-5)
