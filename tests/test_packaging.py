"""What a wheel, a wheel made from the sdist and an editable install give a user."""

import os
import shutil
import site
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

import mfac_jax

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = PROJECT["tool"]["setuptools"]["packages"]

IMPORT_FROM_ELSEWHERE = """
import importlib.util
import mfac_jax, mfac_jax.kernels
assert importlib.util.find_spec("kernels") is None, "a top-level `kernels` was installed"
for package in {packages}:
    importlib.import_module(package)
print(mfac_jax.__file__)
print(mfac_jax.kernels.__file__)
"""


def run(*command: str | Path, cwd: Path) -> str:
    # PYTHONPATH would hide what was installed; pip's checks would ask the network.
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    env |= {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources: building leaves files behind."""
    copy = tmp_path_factory.mktemp("source") / "project"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("kernels", "mfac_jax"):
        no_cache = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=no_cache)
    return copy


@pytest.fixture(scope="module")
def wheels(source: Path) -> dict[str, Path]:
    build = (sys.executable, "-m", "build", "--no-isolation")
    run(*build, "--wheel", "--outdir", "direct", cwd=source)
    shutil.rmtree(source / "build")
    run(*build, "--outdir", "through_sdist", cwd=source)
    return {kind: next((source / kind).glob("*.whl")) for kind in ("direct", "through_sdist")}


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """The Python of a new environment with this one's packages, but not its own install.

    A directory named in a .pth file lends its packages, while the .pth files inside
    it, by which an editable install works, are not read.
    """
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "env", cwd=tmp_path)
    variables = {"base": str(tmp_path / "env"), "platbase": str(tmp_path / "env")}
    own = Path(sysconfig.get_path("purelib", scheme="venv", vars=variables))
    lent = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()]
    (own / "lent.pth").write_text("\n".join(dict.fromkeys(lent)) + "\n")
    scripts = sysconfig.get_path("scripts", scheme="venv", vars=variables)
    return Path(scripts) / Path(sys.executable).name


def modules(folder: Path, package: str) -> set[str]:
    prefix = package.replace(".", "/")
    return {f"{prefix}/{path.name}" for path in folder.glob("*.py")}


def test_every_folder_with_code_is_in_the_list_of_packages():
    folders = {
        Path(folder)
        for folder, _, files in os.walk(ROOT / "mfac_jax", followlinks=True)
        if any(name.endswith(".py") for name in files)
    }
    found = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert sorted(found) == sorted(PACKAGES)
    assert all((folder / "__init__.py").exists() for folder in folders)


def test_kernels_is_linked_into_the_package():
    link = ROOT / "mfac_jax" / "kernels"
    assert link.is_symlink()
    assert link.readlink() == Path("../kernels")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["direct", "through_sdist"])
def test_wheel_holds_the_package_and_nothing_else(wheels: dict[str, Path], kind: str):
    expected = {"mfac_jax/py.typed"}
    for package in PACKAGES:
        expected |= modules(ROOT / package.replace(".", "/"), package)
    with zipfile.ZipFile(wheels[kind]) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        licenses = [name for name in wheel.namelist() if name.endswith("licenses/LICENSE")]
    assert names == expected
    assert licenses


@pytest.mark.slow
def test_sdist_holds_the_kernels(wheels: dict[str, Path]):
    [sdist] = wheels["through_sdist"].parent.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert modules(ROOT / "kernels", "kernels") <= names
    assert {"LICENSE", "README.md", "pyproject.toml", "mfac_jax/py.typed"} <= names


@pytest.mark.slow
def test_metadata(wheels: dict[str, Path]):
    with zipfile.ZipFile(wheels["direct"]) as wheel:
        [path] = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
        metadata: Message = Parser().parsestr(wheel.read(path).decode())
    assert metadata["Name"] == "mfac-jax"
    assert metadata["Version"] == mfac_jax.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert set(metadata.get_all("Provides-Extra")) >= {"bench", "dev", "docs", "examples", "test"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["direct", "through_sdist", "editable"])
def test_installed_package_imports_from_elsewhere(
    source: Path, wheels: dict[str, Path], environment: Path, tmp_path: Path, kind: str
):
    what = ("--editable", source) if kind == "editable" else (wheels[kind],)
    pip = (sys.executable, "-m", "pip", "--python", environment, "install", "--quiet")
    offline = ("--no-deps", "--no-build-isolation", "--no-index", "--ignore-installed")
    run(*pip, *offline, *what, cwd=tmp_path)

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    code = IMPORT_FROM_ELSEWHERE.format(packages=PACKAGES)
    package, kernels = run(environment, "-c", code, cwd=elsewhere).split()

    home = source if kind == "editable" else environment.parents[1]
    assert Path(package).is_relative_to(home)
    assert Path(kernels).is_relative_to(home)
