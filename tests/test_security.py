"""What others wrote, models among them, is data: it is not run, leads nowhere, and no secret gets into what is kept."""

import ast
import json
import os
import shutil
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import endpoint
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from running import TINY, run_stage, set_params
from test_bad_worlds import edit, make_model
from test_evaluate_alpaca import by_model, files_that_hold, judged, likes_ours, world  # noqa: F401
from test_rank import OVERRIDES, RANK, ROWS, write

from stages import diff, markdown, params, pointers, policy
from stages.assets import harness
from stages.cli import ROOT, StageError

HARNESS = Path(sys.prefix).parent / "harness" / "bin" / "python"
SECRET = "sk-planted-in-this-test"


class Payload:
    """Pickled, it makes a file when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def plant(folder: Path, mark: Path) -> None:
    """Pickled weights beside the others, which make `mark` where they are loaded."""
    torch.save({"x": Payload(mark)}, folder / "pytorch_model.bin")


def plant_code(folder: Path, mark: Path, *, new: bool) -> None:
    """Code of the model's own, which makes `mark` where it is imported; new: a kind of model that needs it."""
    code = (
        f"import os\nos.mkdir({str(mark)!r})\nfrom transformers import LlamaConfig, LlamaForCausalLM\n"
        "class Config(LlamaConfig):\n    model_type = 'new'\n\nclass Model(LlamaForCausalLM):\n    config_class = Config\n"
    )
    (folder / "code.py").write_text(code)
    edit(
        folder / "config.json",
        auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"},
        **({"model_type": "new", "architectures": ["Model"]} if new else {}),
    )


def test_the_payload_works(tmp_path: Path) -> None:
    """Else the tests below could not fail."""
    plant(tmp_path, tmp_path / "ran")
    torch.load(tmp_path / "pytorch_model.bin", weights_only=False)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("new", [True, False])
def test_a_models_own_code_is_not_run(tmp_path: Path, new: bool) -> None:
    model = make_model(tmp_path / "model")
    plant_code(model, tmp_path / "ran", new=new)
    if new:
        with pytest.raises(StageError, match="has code of its own, which is not run: take a model that transformers knows"):
            policy.load(model, "float32")
    else:
        assert type(policy.load(model, "float32")).__module__.startswith("transformers.")
    assert not (tmp_path / "ran").exists()


def test_a_pickle_beside_the_weights_is_not_loaded(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    plant(model, tmp_path / "ran")
    policy.load(model, "float32")
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
def test_the_harness_loads_neither_pickles_nor_code(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    plant(model, tmp_path / "ran")
    plant_code(model, tmp_path / "ran", new=False)
    (tmp_path / "exact_match").mkdir()
    (tmp_path / "exact_match" / "exact_match.py").write_text(harness.EXACT_MATCH)
    code = (
        "from pathlib import Path; from stages import evaluate_lm, pointers; "
        "lm = evaluate_lm._policy(str(pointers.model(Path('model'))), 'float32', 1); print(type(lm.model).__module__)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([HARNESS, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("transformers.")
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
def test_vllm_loads_no_pickle(tmp_path: Path) -> None:
    """Not even one alone, were it to come so far."""
    model = make_model(tmp_path / "model")
    (model / "model.safetensors").unlink()
    plant(model, tmp_path / "ran")
    set_params(tmp_path, TINY)
    code = (
        "from pathlib import Path; from stages import params, sampling; "
        "draw = sampling.Sampling(samples=2, temperature=1, top_p=1, max_new_tokens=9, seed=0, name='x'); "
        "sampling.load(Path('model'), params.load('engine').engine, draw)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "StageError: model: vLLM does not start (RuntimeError: Cannot find any model weights" in done.stderr
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
def test_llm_blender_loads_no_pickle(tmp_path: Path) -> None:
    """It would take one first. With and without it the rankings are the same; other weights than PairRM's are refused."""
    set_params(tmp_path, OVERRIDES)
    done = run_stage(tmp_path, "assets.ranker", "ranker")
    assert done.returncode == 0, done.stderr
    write(ROWS[:2], tmp_path / "responses.parquet")
    for out in ("without.parquet", "with.parquet"):
        done = run_stage(tmp_path, "rank", "ranker", "responses.parquet", out, SPPO_WORKERS="1")
        assert done.returncode == 0, done.stderr
        plant(tmp_path / "ranker/PairRM", tmp_path / "ran")
    assert (tmp_path / "with.parquet").read_bytes() == (tmp_path / "without.parquet").read_bytes()
    assert not (tmp_path / "ran").exists()
    program = (
        "import sys; from safetensors.torch import load_file, save_file; path = sys.argv[1]; weights = load_file(path);"
        "del weights['head_layer.4.bias']; save_file(weights, path)"
    )
    subprocess.run([str(RANK), "-c", program, str(tmp_path / "ranker/PairRM/model.safetensors")], check=True)
    done = run_stage(tmp_path, "rank", "ranker", "responses.parquet", "other.parquet", SPPO_WORKERS="1")
    assert done.returncode == 1
    assert "not the weights of PairRM over" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "other.parquet").exists()


def test_nothing_is_trusted_run_by_a_shell_or_read_as_unsafe_yaml() -> None:
    """Of every call in the project's code: no remote code, no pickle, no shell, YAML of plain values or round-tripped."""
    wrong = []
    for path in sorted((ROOT / "stages").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if (
                given.get("trust_remote_code", "False") != "False"
                or given.get("shell", "False") != "False"
                or name in ("eval", "exec", "os.system", "torch.load", "pickle.load", "pickle.loads")
                or (name == "YAML" and given.get("typ", "'rt'") not in ("'safe'", "'rt'"))
            ):
                wrong.append(f"{path.name}:{node.lineno}: {ast.unparse(node)}")
    assert not wrong


@pytest.mark.parametrize("name", ["../../x.json", "/etc/passwd", "a/b.json", ".."])
def test_a_pointer_leads_nowhere_out_of_the_snapshot(tmp_path: Path, name: str) -> None:
    pointer = {"repo": "a/b", "revision": "0" * 40, "repo_type": "model", "files": {name: {"size": 1, "sha256": "-"}}}
    (tmp_path / pointers.NAME).write_text(json.dumps(pointer))
    with pytest.raises(StageError, match="not the name of a file in the snapshot") as error:
        pointers.resolve(tmp_path)
    assert name in str(error.value)


@pytest.mark.parametrize("name", ["../x", "a/b", "..", "/x", "a\nb", ""])
def test_an_iterations_name_leads_nowhere_out_of_data(tmp_path: Path, name: str) -> None:
    set_params(tmp_path, {"iterations": {name: "base"}})
    with pytest.raises(StageError, match="is no name for an iteration"):
        params.load("iterations", path=tmp_path / "params.yaml")


def test_a_key_that_the_judge_quotes_is_kept_nowhere(world: Path) -> None:  # noqa: F811
    """In its answers, and in the message of its refusal, as a server does that shows what it was sent."""

    def quotes(number: int, prompt: str) -> tuple[int, Any]:
        (authorization,) = server.keys
        if number >= 40:
            return 400, {"error": {"message": f"what is {authorization}?"}}
        status, answer = likes_ours(number, prompt)
        answer["choices"][0]["message"]["content"] = authorization
        answer["choices"][0]["logprobs"]["content"][0]["token"] = authorization
        return status, answer

    with endpoint.serve(quotes) as server:
        by_model(world, server.url)
        done = judged(world, OPENAI_API_KEY=SECRET, HF_TOKEN=SECRET)
        assert done.returncode == 0, done.stderr
        assert server.keys == {f"Bearer {SECRET}"}
        assert "Bearer ..." in (world / "out/annotations.json").read_text()
        shutil.rmtree(world / "scratch")
        failed = judged(world, OPENAI_API_KEY=SECRET, SPPO_DEBUG="1")
    assert failed.returncode == 1
    assert "what is Bearer ...?" in failed.stderr
    assert SECRET not in done.stdout + done.stderr + failed.stdout + failed.stderr
    assert not files_that_hold(SECRET, world)


class Page(HTMLParser):
    """The elements of a page, and the text of each table cell."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[str] = []
        self.cells: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_data(self, data: str) -> None:
        if self.cells and data.strip("\n"):
            self.cells[-1] += data


MARKS = "<script> </script> | ` ``` \\ ![x](http://a) [a](javascript:b) <!-- --> &amp; &#60; \0 \u202e \x1b[2J * _ ~~ # > <http://a.b>"
TEXTS = st.lists(st.one_of(st.sampled_from([*MARKS.split(" "), " ", "\n", "\r", "\u2028", "1. ", "- "]), st.text(max_size=3)))


@given(TEXTS.map("".join), TEXTS.map("".join))
def test_escaped_text_is_shown_as_it_is_and_makes_no_element(first: str, second: str) -> None:
    table = markdown.table(["x", "y"], [[first, second]], text=True)
    page = Page(MarkdownIt("commonmark", {"html": True}).enable("table").render(table))
    assert page.elements == ["table", "thead", "tr", "th", "th", "tbody", "tr", "td", "td"]
    assert page.cells == ["x", "y", *(markdown.UNSEEN.sub("\ufffd", " ".join(text.split())) for text in (first, second))]
    assert not markdown.UNSEEN.search(table.replace("\n", ""))


def test_names_on_the_page_of_differences_are_text() -> None:
    hostile = "<img src=x onerror=alert(1)> | `a` [b](javascript:c)"
    one, two = (
        diff.Revision(hostile, {(hostile,): value}, {("alpaca_eval", hostile, "win_rate"): value}, {hostile: {"outs": []}})
        for value in (1, 2)
    )
    two.stages = {}
    page = Page(MarkdownIt("commonmark", {"html": True}).enable("table").render(diff.page(one, two, Path(hostile))))
    assert "table" in page.elements
    assert not {"img", "script", "code", "a"} & set(page.elements)


def listening(pid: int) -> set[str]:
    """The addresses, as hexadecimal numbers, at which a process takes connections."""
    try:
        links = [str(handle.readlink()) for handle in Path(f"/proc/{pid}/fd").iterdir()]
        tables = [Path(f"/proc/{pid}/net/{kind}").read_text() for kind in ("tcp", "tcp6")]
    except OSError:  # it ends as we look
        return set()
    sockets = {link.removeprefix("socket:[").removesuffix("]") for link in links if link.startswith("socket:")}
    rows = [line.split() for table in tables for line in table.splitlines()[1:]]
    return {row[1].partition(":")[0] for row in rows if row[3] == "0A" and row[9] in sockets}


@pytest.mark.slow
def test_training_alone_takes_connections_of_this_machine_only(pairs: Path, tmp_path: Path) -> None:
    set_params(tmp_path, TINY)
    command = [sys.executable, "-m", "stages.train", pairs / "base", pairs / "pairs.parquet", "out", "log.csv"]
    process = subprocess.Popen(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL)
    found: set[str] = set()
    while process.poll() is None:
        found |= listening(process.pid)
        time.sleep(0.05)
    assert process.returncode == 0
    assert found == {"0100007F"}, "127.0.0.1, of gloo"
