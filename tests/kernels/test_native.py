"""Building libraries: kept by what they depend on, whole or not there; a clear word where no compiler is."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from pallas_kernels import native
from pallas_kernels.native import BuildError, Library, Source

CODE = 'extern "C" int answer() { return 42; }\n'


@pytest.fixture
def source(tmp_path: Path) -> Source:
    path = tmp_path / "small.cc"
    path.write_text(CODE)
    return Source(path, folder=tmp_path / "cache")


def test_built_once(source: Source) -> None:
    library = source.build()
    built = library.stat().st_mtime_ns
    assert source.build() == library
    assert library.stat().st_mtime_ns == built
    assert [file.name for file in library.parent.iterdir()] == [library.name]


def test_never_stale(source: Source, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Another source or header, other flags, another compiler, jaxlib or processor: another library."""
    libraries = {source.build()}
    (source.path.parent / "beside.h").write_text("// included by nobody, as far as we know\n")
    libraries.add(source.build())
    libraries.add(dataclasses.replace(source, flags=("-DX=1",)).build())
    compiler = tmp_path / "mycc"
    compiler.write_text('#!/bin/sh\nexec c++ "$@"\n')
    compiler.chmod(0o755)
    libraries.add(dataclasses.replace(source, compiler=str(compiler)).build())
    source.path.write_text(CODE.replace("42", "43"))
    libraries.add(source.build())
    monkeypatch.setattr(native, "processor", lambda: "another")
    libraries.add(source.build())
    monkeypatch.setattr(native.jaxlib.version, "__version__", "99")
    libraries.add(source.build())
    assert len(libraries) == 7


def test_no_compiler(source: Source) -> None:
    with pytest.raises(BuildError, match="no C\\+\\+ compiler: none-such not found"):
        dataclasses.replace(source, compiler="none-such").build()


def test_no_compiler_on_the_path(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(BuildError, match=r"no C\+\+ compiler: c\+\+, g\+\+, clang\+\+ not found"):
        source.build()


def test_compiler_says_why(source: Source) -> None:
    """The message is the compiler's, and nothing is left behind."""
    source.path.write_text("int main() { return nothing_of_that_name; }")
    with pytest.raises(BuildError, match=r"cannot build small\.cc:(.|\n)*nothing_of_that_name"):
        source.build()
    assert not any((source.folder or source.path).iterdir())


def test_compiler_that_does_not_know_the_processor(source: Source, tmp_path: Path) -> None:
    """`-march=native` is refused by some compilers; without it the library is only slower."""
    compiler = tmp_path / "oldcc"
    compiler.write_text(
        '#!/bin/sh\ncase "$*" in *=native*) echo "unknown value native for -march" >&2; exit 1;; esac\n'
        'exec c++ "$@"\n'
    )
    compiler.chmod(0o755)
    assert dataclasses.replace(source, compiler=str(compiler)).build().exists()


def test_folder_that_cannot_be_made(source: Source, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BuildError, match="file"):
        dataclasses.replace(source, folder=tmp_path / "file" / "cache").build()


def test_processes_at_once(source: Source) -> None:
    """All get the same whole library, and no half-built one is left."""
    code = (
        "import ctypes, sys; from pathlib import Path; from pallas_kernels.native import Source\n"
        "library = Source(Path(sys.argv[1]), folder=Path(sys.argv[2])).build()\n"
        "print(library.name, ctypes.CDLL(str(library)).answer())"
    )
    command = [sys.executable, "-c", code, str(source.path), str(source.folder)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = {process.communicate()[0].strip() for process in running}
    assert [process.returncode for process in running] == [0, 0, 0]
    assert len(said) == 1
    assert said.pop().endswith(" 42")
    assert source.folder is not None
    assert len(list(source.folder.iterdir())) == 1


def test_background(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    """`prepare` returns before the build is done; its failure is raised where the library is wanted."""
    library = Library(dataclasses.replace(source, compiler="none-such"), ("Handler",))
    library.prepare()
    for _ in range(2):
        with pytest.raises(BuildError, match="none-such"):
            library.targets()


def test_handler_that_is_not_there(source: Source) -> None:
    with pytest.raises(BuildError, match=r"small\.cc.*Missing"):
        Library(source, ("Missing",)).targets()
