"""lm-eval over local files: templates, users' own YAMLs, and errors in plain words."""

from __future__ import annotations

import json

import pytest
import torch

from fewbits.eval.tasks import find_tasks, run_tasks
from fewbits.quant.errors import FewbitsError

torch.set_num_threads(1)
pytest.importorskip("lm_eval")


@pytest.fixture(scope="module", autouse=True)
def private_cache(tmp_path_factory):
    """`datasets` keeps converted copies; not in the user's cache."""
    import datasets.config

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(scope="module")
def pair(tiny):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = tiny("llama")
    return AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


PIQA = [{"query": f"Question: how {i}?\n", "choices": ["so", "or so"], "gold": i % 2} for i in range(6)]
PAIRS = [{"sentence_good": f"They see it {i}.", "sentence_bad": f"They sees it {i}."} for i in range(5)]

OWN = """
task: own
dataset_path: json
dataset_kwargs: {data_files: {test: data/own.jsonl}}
output_type: multiple_choice
test_split: test
doc_to_text: !function helper.ask
doc_to_choice: "{{choices}}"
doc_to_target: gold
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture
def folder(tmp_path):
    write_jsonl(tmp_path / "zeroshot" / "piqa.jsonl", PIQA)
    write_jsonl(tmp_path / "blimp" / "agreement.jsonl", PAIRS)
    write_jsonl(tmp_path / "blimp" / "binding.jsonl", PAIRS[:3])
    write_jsonl(tmp_path / "mine" / "data" / "own.jsonl", PIQA)
    (tmp_path / "mine" / "own.yaml").write_text(OWN)
    (tmp_path / "mine" / "helper.py").write_text("def ask(doc):\n    return doc['query'].upper()\n")
    (tmp_path / "mine" / "both.yaml").write_text("group: both\ntask: [own, own2]\n"
                                                 "aggregate_metric_list: [{metric: acc, weight_by_size: true}]\n")
    (tmp_path / "mine" / "own2.yaml").write_text("include: own.yaml\ntask: own2\n")
    return tmp_path


def test_templates_and_own_tasks_are_found_and_run(folder, pair):
    found = find_tasks(["piqa", "blimp", "both"], folder)
    assert not found.catalogue
    assert "piqa.jsonl" in found.origins["piqa"] and "2 files" in found.origins["blimp"]
    scores = run_tasks(*pair, found, limit=4)
    assert set(scores) == {"piqa", "blimp", "blimp_agreement", "blimp_binding", "both", "own", "own2"}
    assert set(scores["piqa"]) == {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr", "documents"}
    assert scores["piqa"]["documents"] == 4 and scores["blimp"]["documents"] == 7
    assert 0 <= scores["blimp"]["acc"] <= 1 and scores["piqa"]["acc_stderr"] > 0
    json.dumps(scores, allow_nan=False)


def test_accuracy_is_that_of_a_loop(folder, pair):
    """BLiMP by hand: the sentence with the higher log-likelihood after BOS."""
    model, tokenizer = pair
    right = 0
    for row in PAIRS:
        scores = []
        for key in ("sentence_good", "sentence_bad"):
            ids = torch.tensor([[1, *tokenizer(" " + row[key], add_special_tokens=False)["input_ids"]]])
            with torch.no_grad():
                log_probs = model(ids).logits[0].log_softmax(-1)
            scores.append(log_probs[:-1].gather(1, ids[0, 1:, None]).sum().item())
        right += scores[0] > scores[1]
    result = run_tasks(model, tokenizer, ["blimp_agreement"], task_dir=folder / "blimp")
    assert result["blimp_agreement"]["acc"] == pytest.approx(right / len(PAIRS))


def test_own_yaml_goes_before_the_template(folder):
    (folder / "piqa.yaml").write_text(OWN.replace("task: own", "task: piqa").replace("data/own", "zeroshot/piqa"))
    found = find_tasks(["piqa"], folder)
    assert found.origins["piqa"].endswith("piqa.yaml")
    assert found.configs["piqa"]["dataset_kwargs"]["data_files"]["test"] == str(folder / "zeroshot" / "piqa.jsonl")


def test_broken_yaml_is_passed_over_and_include_cycles_end(folder):
    (folder / "x.yaml").write_text("a: [")
    (folder / "y.yaml").write_text("include: z.yaml\ntask: y\n")
    (folder / "z.yaml").write_text("include: y.yaml\ntask: z\n")
    assert find_tasks(["piqa"], folder).names == ("piqa",)


def test_bad_input(folder, pair, monkeypatch):
    with pytest.raises(FewbitsError, match=r"--task-dir .*no such directory"):
        find_tasks(["piqa"], folder / "none")
    write_jsonl(folder / "zeroshot" / "piqa.jsonl", [])
    (folder / "zeroshot" / "piqa.jsonl").write_text("not json\n")
    with pytest.raises(FewbitsError, match="the data cannot be read"):
        run_tasks(*pair, ["piqa"], task_dir=folder)
    with pytest.raises(FewbitsError, match="Duplicate task 'blimp_binding'"):
        run_tasks(*pair, ["blimp", "blimp_binding"], task_dir=folder)
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(FewbitsError, match=r"pip install 'fewbits\[tasks\]'"):
        find_tasks(["piqa"], folder)


@pytest.mark.slow
def test_unknown_names(folder):
    """Slow: lm-eval's catalogue is read before a name is called unknown."""
    with pytest.raises(FewbitsError, match="did you mean 'blimp_agreement'"):
        find_tasks(["blimp_agreemen"], folder)
    with pytest.raises(FewbitsError, match="--tasks qqqqqqqqqq: no such task"):
        find_tasks(["qqqqqqqqqq"], None)
    assert find_tasks(["hellaswag", "piqa"], folder).catalogue


@pytest.mark.slow
def test_reference_data(data_dir, pair):
    names = ["piqa", "copa", "arc_easy", "winogrande", "lambada_openai", "blimp"]
    found = find_tasks(names, data_dir)
    assert not found.catalogue
    scores = run_tasks(*pair, ["copa", "winogrande", "blimp"], task_dir=data_dir, limit=3)
    assert scores["blimp"]["documents"] == 18
    assert set(scores["winogrande"]) == {"acc", "acc_stderr", "documents"}
