"""No line of the packages unpickles, runs code that a file brings, or loads a model outside the
modules that check it.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("pipeline", "data_prep", "train_controlnet", "train_baselines", "generate", "evaluate")
LOADING = {
    "models/stable_diffusion/loading.py",
    "models/stable_diffusion/text.py",
    "evaluate/scores/extractors/huggingface.py",
}
MODULES = {"pickle", "dill", "cloudpickle", "shelve", "marshal"}
UNSAFE_YAML = {"load", "unsafe_load", "full_load", "load_all", "unsafe_load_all", "full_load_all"}
UNKNOWN_CLASSES = ("AutoModel", "AutoTokenizer", "AutoPipeline", "DiffusionPipeline")


def problems(text: str, loads: bool = False) -> Iterator[str]:
    """Yield what is unsafe in a module's code.

    Args:
        text: the code.
        loads: whether it is one of the modules that load models.
    """
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            yield from (f"imports {name}" for name in names if name.split(".")[0] in MODULES)
        if isinstance(node, ast.Call):
            yield from _problems_of_call(node, loads)


def _problems_of_call(call: ast.Call, loads: bool) -> Iterator[str]:
    name = ast.unparse(call.func)
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    last = name.rpartition(".")[2]
    if name in ("eval", "exec"):
        yield f"{name} runs code"
    if given.get("trust_remote_code", "False") != "False" or "custom_pipeline" in given:
        yield f"{name} may run code of a file"
    if given.get("allow_pickle", "False") != "False" or (
        name in ("np.load", "numpy.load") and "allow_pickle" not in given
    ):
        yield f"{name} without allow_pickle=False"
    if name == "torch.load" and given.get("weights_only") != "True":
        yield "torch.load without weights_only=True"
    if name.startswith("yaml.") and last in UNSAFE_YAML:
        yield name
    if last == "load_lora_weights" and given.get("use_safetensors") != "True":
        yield "load_lora_weights without use_safetensors=True"
    if last in ("from_pretrained", "from_single_file"):
        without_code = given.get("trust_remote_code") == "False" and given.get("use_safetensors") == "True"
        if not loads or (name.rpartition(".")[0].endswith(UNKNOWN_CLASSES) and not without_code):
            yield f"{name} outside the modules that load models"
        if given.get("local_files_only") != "True":
            yield f"{name} without local_files_only=True: it would not read the files that were checked"


@pytest.mark.parametrize("package", PACKAGES)
def test_nothing_reads_in_an_unsafe_way(package: str) -> None:
    found = {
        name: bad
        for path in sorted((ROOT / package).rglob("*.py"))
        if (
            bad := list(
                problems(path.read_text(encoding="utf-8"), (name := path.relative_to(ROOT).as_posix()) in LOADING)
            )
        )
    }
    assert not found


def test_weights_are_read_as_safetensors_only() -> None:
    """The one call that reads networks asks for safetensors.

    Tokenizers and schedulers have no weights.
    """
    calls = [
        {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        for node in ast.walk(ast.parse((ROOT / "models/stable_diffusion/loading.py").read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".from_pretrained")
    ]
    networks = [given for given in calls if "output_loading_info" in given]
    assert len(networks) == 1
    assert networks[0]["use_safetensors"] == "True"
    assert len(calls) == 2


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from dill import loads",
        "eval(text)",
        "torch.load(path, map_location=torch.device('cpu'))",
        "torch.load(path, weights_only=False)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text, Loader)",
        "f(trust_remote_code=True)",
        "f(trust_remote_code=asked)",
        "f(custom_pipeline='x')",
        "AutoencoderKL.from_pretrained(folder, local_files_only=True)",
        "pipe.load_lora_weights(folder)",
    ],
)
def test_what_is_unsafe_is_found(line: str) -> None:
    assert list(problems(line))


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(path, weights_only=True)",
        "np.load(path, allow_pickle=False)",
        "yaml.safe_load(text)",
        "f(trust_remote_code=False)",
        "pipe.load_lora_weights(folder, use_safetensors=True)",
        "text = 'torch.load(path)'",
    ],
)
def test_what_is_safe_is_left(line: str) -> None:
    assert not list(problems(line))
    assert not list(problems("kind.from_pretrained(folder, local_files_only=True)", loads=True))
    assert list(problems("kind.from_pretrained(folder)", loads=True))
    assert list(problems("DiffusionPipeline.from_pretrained(folder, local_files_only=True)", loads=True))
    auto = "transformers.AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True"
    assert list(problems(f"{auto})", loads=True))
    assert not list(problems(f"{auto}, trust_remote_code=False)", loads=True))
