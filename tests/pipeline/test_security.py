"""Third-party data, models included, is never run, leads to no other file, and no secret gets into what is kept."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import time
import unicodedata
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from stages.artifacts import harness_sets, pointers
from stages.engines import training
from stages.reporting import markdown
from stages.runtime import params
from stages.runtime.errors import StageError
from stages.runtime.paths import ROOT
from stages.tools import diff, revisions
from support import endpoint, judging, ranker
from support.messages import assert_message
from support.models import edit_json, make_model
from support.running import TINY, run_program, run_sampling, run_stage, set_params

SECRET = "sk-planted-in-this-test"


class Payload:
    """When unpickled, it makes a folder."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def plant(folder: Path, mark: Path) -> None:
    """Add pickled weights that make the folder `mark` when they are loaded."""
    torch.save({"x": Payload(mark)}, folder / "pytorch_model.bin")


def plant_code(folder: Path, mark: Path, *, new: bool) -> None:
    """Add Python code to a model that makes the folder `mark` when imported. new: only this code defines its architecture."""
    code = (
        f"import os\nos.mkdir({str(mark)!r})\nfrom transformers import LlamaConfig, LlamaForCausalLM\n"
        "class Config(LlamaConfig):\n    model_type = 'new'\n\nclass Model(LlamaForCausalLM):\n    config_class = Config\n"
    )
    (folder / "code.py").write_text(code)
    edit_json(
        folder / "config.json",
        auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"},
        **({"model_type": "new", "architectures": ["Model"]} if new else {}),
    )


def test_the_payload_works(tmp_path: Path) -> None:
    """Otherwise the tests below could not fail."""
    plant(tmp_path, tmp_path / "ran")
    torch.load(tmp_path / "pytorch_model.bin", weights_only=False)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("new", [True, False])
def test_code_that_comes_with_a_model_is_not_run(tmp_path: Path, new: bool) -> None:
    model = make_model(tmp_path / "model")
    plant_code(model, tmp_path / "ran", new=new)
    if new:
        with pytest.raises(StageError) as error:
            training.load_policy(model, "float32")
        assert_message(str(error.value), str(model), "code of its own", "transformers")
    else:
        assert type(training.load_policy(model, "float32")).__module__.startswith("transformers.")
    assert not (tmp_path / "ran").exists()


def test_a_pickle_beside_the_weights_is_not_loaded(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    plant(model, tmp_path / "ran")
    training.load_policy(model, "float32")
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
def test_the_harness_loads_neither_pickles_nor_code(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    plant(model, tmp_path / "ran")
    plant_code(model, tmp_path / "ran", new=False)
    harness_sets.write_exact_match(tmp_path)
    code = (
        "from pathlib import Path; from stages.artifacts import pointers; from stages.engines import harness_worker; "
        "model = str(pointers.check_model(Path('model'))); "
        "print(type(harness_worker.load_policy(model, 'float32', 1).model).__module__)"
    )
    done = run_program(tmp_path, "evaluate-lm", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("transformers.")
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
def test_vllm_loads_no_pickle(tmp_path: Path) -> None:
    """Not even if there are no other weights and the checks before vLLM are skipped."""
    model = make_model(tmp_path / "model")
    (model / "model.safetensors").unlink()
    plant(model, tmp_path / "ran")
    set_params(tmp_path, TINY)
    code = (
        "from pathlib import Path; from stages.engines import sampling; from stages.runtime import params; "
        "sampling.start_engine(Path('model'), params.load('engine').engine, 0)"
    )
    done = run_sampling(tmp_path, code)
    assert done.returncode == 1
    error = next(line for line in done.stderr.splitlines() if "StageError: " in line)
    assert_message(error, "model", "vLLM", "Cannot find any model weights", "params.yaml")
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
def test_llm_blender_loads_no_pickle(tmp_path: Path) -> None:
    """llm-blender itself would prefer a pickle. The rankings are the same with one and without."""
    folder = ranker.make_ranker(tmp_path)
    responses = ranker.write_responses(ranker.ROWS[:2], tmp_path / "responses.parquet")
    rank = ("rank", "--ranker", folder, "--responses", responses, "--out")
    for out in ("without.parquet", "with.parquet"):
        done = run_stage(tmp_path, *rank, out, SPPO_WORKERS="1")
        assert done.returncode == 0, done.stderr
        plant(folder / "PairRM", tmp_path / "ran")
    assert (tmp_path / "with.parquet").read_bytes() == (tmp_path / "without.parquet").read_bytes()
    assert not (tmp_path / "ran").exists()
    program = (
        "import sys; from safetensors.torch import load_file, save_file; path = sys.argv[1]; weights = load_file(path);"
        "del weights['head_layer.4.bias']; save_file(weights, path)"
    )
    weights = folder / "PairRM" / "model.safetensors"
    subprocess.run([str(ranker.PYTHON), "-c", program, str(weights)], check=True)
    done = run_stage(tmp_path, *rank, "other.parquet", SPPO_WORKERS="1")
    assert done.returncode == 1
    assert_message(done.stderr, str(weights), "PairRM", "assets.ranker")
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "other.parquet").exists()


def test_no_call_trusts_code_pickles_shells_or_unsafe_yaml() -> None:
    """Checks every call in the project's code: no remote code, no pickle, no shell, YAML only of plain values or round-trip."""
    unsafe = []
    for path in sorted((ROOT / "stages").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if (
                given.get("trust_remote_code", "False") != "False"
                or given.get("shell", "False") != "False"
                or name in ("eval", "exec", "os.system", "torch.load", "pickle.load")
                or (name == "pickle.loads" and path.name != "workers.py")  # between a stage and its own processes
                or (name == "YAML" and given.get("typ", "'rt'") not in ("'safe'", "'rt'"))
            ):
                unsafe.append(f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}")
    assert not unsafe


@pytest.mark.parametrize("name", ["../../x.json", "/etc/passwd", "a/b.json", ".."])
def test_a_pointer_does_not_lead_out_of_the_snapshot(tmp_path: Path, name: str) -> None:
    pointer = {"repo": "a/b", "revision": "0" * 40, "repo_type": "model", "files": {name: {"size": 1, "sha256": "-"}}}
    (tmp_path / pointers.NAME).write_text(json.dumps(pointer))
    with pytest.raises(StageError) as error:
        pointers.resolve(tmp_path)
    assert_message(str(error.value), str(tmp_path / pointers.NAME), f"files.{name}", "dvc repro")


@pytest.mark.parametrize("name", ["../x", "a/b", "..", "/x", "a\nb", ""])
def test_an_iterations_name_does_not_lead_out_of_data(tmp_path: Path, name: str) -> None:
    set_params(tmp_path, {"iterations": {name: "base"}})
    with pytest.raises(StageError) as error:
        params.load("iterations", path=tmp_path / "params.yaml")
    assert_message(str(error.value), "params.yaml", "iterations", repr(name), "a-z")


@pytest.mark.slow
def test_a_key_that_the_judge_quotes_is_kept_nowhere(tmp_path: Path) -> None:
    """Neither from its answers nor from its refusal: some servers show what they were sent."""
    judging.write_evaluation(tmp_path)

    def quote_key(number: int, prompt: str) -> tuple[int, Any]:
        (authorization,) = server.keys
        if number >= 40:
            return 400, {"error": {"message": f"what is {authorization}?"}}
        status, answer = judging.prefer_ours(number, prompt)
        answer["choices"][0]["message"]["content"] = authorization
        answer["choices"][0]["logprobs"]["content"][0]["token"] = authorization
        return status, answer

    with endpoint.serve(quote_key) as server:
        judging.set_model_judge(tmp_path, server.url)
        done = judging.run_judge(tmp_path, OPENAI_API_KEY=SECRET, HF_TOKEN=SECRET)
        assert done.returncode == 0, done.stderr
        assert server.keys == {f"Bearer {SECRET}"}
        assert "Bearer ..." in (tmp_path / "out/annotations.json").read_text()
        shutil.rmtree(tmp_path / "scratch")
        failed = judging.run_judge(tmp_path, OPENAI_API_KEY=SECRET, SPPO_DEBUG="1")
    assert failed.returncode == 1
    assert "what is Bearer ...?" in failed.stderr
    assert SECRET not in done.stdout + done.stderr + failed.stdout + failed.stderr
    assert not judging.files_containing(SECRET, tmp_path)


class Page(HTMLParser):
    """Parses a page: the tags of its elements, and the text of each table cell."""

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
def test_escaped_text_is_shown_verbatim_and_makes_no_element(first: str, second: str) -> None:
    table = markdown.table(["x", "y"], [[first, second]], text=True)
    page = Page(MarkdownIt("commonmark", {"html": True}).enable("table").render(table))
    assert page.elements == ["table", "thead", "tr", "th", "th", "tbody", "tr", "td", "td"]
    assert page.cells == ["x", "y", *map(markdown.clean, (first, second))]
    hidden = {char for char in table if unicodedata.category(char) in ("Cc", "Cf", "Cs")}
    assert hidden <= {"\n", *markdown.JOINERS}


def test_names_on_the_page_of_differences_are_text() -> None:
    hostile = "<img src=x onerror=alert(1)> | `a` [b](javascript:c)"
    key = ("alpaca_eval", hostile, "win_rate")
    a = revisions.Revision(hostile, {(hostile,): 1}, {key: 1}, {hostile: {"outs": []}})
    b = revisions.Revision(hostile, {(hostile,): 2}, {key: 2}, {})
    page = Page(MarkdownIt("commonmark", {"html": True}).enable("table").render(diff.compare(a, b, Path(hostile))))
    assert "table" in page.elements
    assert not {"img", "script", "code", "a"} & set(page.elements)


def listening_addresses(pid: int) -> set[str]:
    """Return the addresses, as hexadecimal numbers, at which a process accepts connections."""
    try:
        links = [str(handle.readlink()) for handle in Path(f"/proc/{pid}/fd").iterdir()]
        tables = [Path(f"/proc/{pid}/net/{kind}").read_text(encoding="utf-8") for kind in ("tcp", "tcp6")]
    except OSError:  # the process has just ended
        return set()
    sockets = {link.removeprefix("socket:[").removesuffix("]") for link in links if link.startswith("socket:")}
    rows = [line.split() for table in tables for line in table.splitlines()[1:]]
    return {row[1].partition(":")[0] for row in rows if row[3] == "0A" and row[9] in sockets}


@pytest.mark.slow
def test_training_in_one_process_accepts_connections_of_this_machine_only(pairs: Path, tmp_path: Path) -> None:
    set_params(tmp_path, TINY)
    command = [sys.executable, "-m", "stages", "train", "--model", pairs / "base", "--pairs", pairs / "pairs.parquet"]
    command += ["--out", "out", "--out-log", "log.csv", "--out-update", "log.json"]
    process = subprocess.Popen(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL)
    addresses: set[str] = set()
    while process.poll() is None:
        addresses |= listening_addresses(process.pid)
        time.sleep(0.05)
    assert process.returncode == 0
    assert addresses == {"0100007F"}, "127.0.0.1, by gloo"


PACKAGES = sorted(path for path in (ROOT / "requirements").glob("*.txt") if not path.stem.endswith("-overrides"))


@pytest.mark.parametrize("path", PACKAGES, ids=lambda path: path.stem)
def test_every_package_is_pinned_by_hash(path: Path) -> None:
    text = re.sub(r"^ *#.*$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    entries = [" ".join(entry.split()) for entry in text.replace("\\\n", " ").splitlines() if entry.strip()]
    assert entries
    for entry in entries:
        assert re.fullmatch(r"[a-z0-9._-]+(\[[a-z0-9,_-]+\])?==\S+( ; [^#]*?)?( --hash=sha256:[0-9a-f]{64})+", entry), entry


def test_nothing_is_installed_without_its_hash() -> None:
    script = (ROOT / "requirements/install.sh").read_text(encoding="utf-8")
    installs = [
        line for line in script.splitlines() if re.search(r"pip (install|sync)", line) and not line.lstrip().startswith("#")
    ]
    assert len(installs) >= 2
    assert all("--require-hashes" in line for line in installs)


def test_actions_are_pinned_by_commit() -> None:
    uses = [
        line for path in (ROOT / ".github/workflows").glob("*.yml") for line in path.read_text().splitlines() if "uses:" in line
    ]
    assert uses
    assert all(re.search(r"uses: [\w/-]+@[0-9a-f]{40} # v[0-9.]+$", line) for line in uses)
