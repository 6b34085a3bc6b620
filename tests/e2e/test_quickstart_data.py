"""The quickstart's data, on a small library made here: nothing held out may be seen in training, by copy or by cut.

Knows nothing of the real standard library but in the last test, which looks at what the quickstart will really ask.
"""

import random
import sys
import sysconfig
from collections import Counter
from pathlib import Path

import pytest

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart"
sys.path.insert(0, str(QUICKSTART))

import data  # noqa: E402

PACKAGES = data.CANDIDATE_PACKAGES[: data.NUM_PACKAGES]


def function_text(package: str, number: int, copied: bool = False) -> str:
    """A function with one statement of each keyword. A copy is the same in every package."""
    word = "shared" if copied else package
    lines = [f"def {word}_{number}(self, value):", f"    first_{word} = value.{word}_{number}()"]
    for keyword, rest in (
        ("if", f"{word}_ready_{number}: pass"),
        ("for", f"item in {word}_items_{number}: pass"),
        ("while", f"{word}_busy_{number}: pass"),
        ("with", f"{word}_open_{number}() as handle: pass"),
        ("raise", f"{word.title()}Error({number})"),
        ("return", f"{word}_result_{number}"),
    ):
        lines += [f"    {word}_{keyword}_{number} = prepare({number})", f"    {keyword} {rest}"]
    return "\n".join(lines)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packages with 320 functions each, some of them copies of one another's."""
    root = tmp_path_factory.mktemp("lib")
    for package in PACKAGES:
        directory = root / package
        directory.mkdir()
        functions = [function_text(package, number) for number in range(300)]
        functions += [function_text(package, number, copied=True) for number in range(20)]
        (directory / "module.py").write_text("import os\n\n\n" + "\n\n\n".join(functions) + "\n", "utf-8")
    (root / "site-packages").mkdir()
    (root / "site-packages" / "stranger.py").write_text("def stranger():\n    return 1\n", "utf-8")
    (root / "broken.py").write_text("def broken(:\n", "utf-8")
    return root


@pytest.fixture(scope="module")
def built(library: Path) -> data.Quickstart:
    return data.build(library)


def test_window_of_a_keyword_line_blanks_only_that_keyword() -> None:
    source = "def f(self):\n    x = g()\n    y = h()\n    return x if y else None"
    function = data.Function("json", source, frozenset({0, 1, 2, 3}))
    (window,) = data.windows_of(function)
    assert window.keyword == "return"
    assert window.prompt == "def f(self):\n    x = g()\n    y = h()\n    ____ x if y else None" + data.SUFFIX


def test_window_of_a_keyword_inside_a_docstring_is_not_made() -> None:
    source = 'def f(self):\n    """Say it\n\n    if you must.\n    """\n    x = 1'
    functions = [function for _, _, function in data.functions_of(source, "json")]
    assert [list(data.windows_of(function)) for function in functions] == [[]]


def test_split_file_cuts_what_it_holds_out(library: Path) -> None:
    text = (library / PACKAGES[0] / "module.py").read_text("utf-8")
    rest, kept, held_out = data.split_file(text, PACKAGES[0], seed=0)
    assert len(kept) + len(held_out) == 320
    assert 10 < len(held_out) < 60
    assert all(function.source in text and function.source not in rest for function in held_out)
    assert all(function.source in rest for function in kept)


def test_build_holds_nothing_out_that_training_sees(built: data.Quickstart) -> None:
    everything = data.squeezed("\n".join(built.base_texts))
    for task in ("packages", "keywords"):
        trained = {data.squeezed(row.prompt) for row in built.train[task]}
        for row in built.held_out[task]:
            assert data.squeezed(row.prompt) not in trained
            code = row.prompt.removesuffix(data.SUFFIX)
            for keyword in data.KEYWORDS:
                assert data.squeezed(code.replace(data.BLANK, keyword)) not in everything


def test_build_never_gives_copies_of_a_function_to_both_sides(built: data.Quickstart) -> None:
    def copies(rows: dict[str, tuple[data.Row, ...]]) -> set[str]:
        words = (word for task in rows.values() for row in task for word in row.prompt.split())
        return {word for word in words if word.startswith("shared_result_")}

    assert copies(built.train)
    assert not copies(built.train) & copies(built.held_out)


def test_build_held_out_rows_are_balanced_and_many(built: data.Quickstart) -> None:
    for task, classes in (("packages", PACKAGES), ("keywords", data.KEYWORDS)):
        counts = Counter(row.completion for row in built.held_out[task])
        assert set(counts) == {f" {name}" for name in classes}
        assert len(set(counts.values())) == 1
        assert counts.total() >= data.MIN_HELD_OUT_ROWS
        assert data.best_constant(built.held_out[task])[1] == pytest.approx(1 / len(classes))


def test_build_is_the_same_every_time_and_another_seed_holds_out_others(
    library: Path, built: data.Quickstart, tmp_path: Path
) -> None:
    random.seed(1)  # the global generator must not matter
    again, other = data.build(library), data.build(library, seed=1)
    data.write(built, tmp_path / "one")
    data.write(again, tmp_path / "two")
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == [
        "base.jsonl",
        "keywords-heldout.jsonl",
        "keywords-train.jsonl",
        "packages-heldout.jsonl",
        "packages-train.jsonl",
    ]
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in files)
    assert {row.prompt for row in other.held_out["packages"]} != {row.prompt for row in built.held_out["packages"]}


def test_build_of_a_bare_library_says_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "asyncio.py").write_text(function_text("asyncio", 1) + "\n", "utf-8")
    with pytest.raises(data.DataError, match="only 0 of the 6 packages"):
        data.build(tmp_path)


def test_library_files_leave_strangers_out(library: Path) -> None:
    names = {path.name for path in data.library_files(library)}
    assert names == {"module.py", "broken.py"}


def test_this_machine_has_the_packages_and_their_names_are_their_own() -> None:
    root = Path(sysconfig.get_path("stdlib"))
    found = {data.package_of(path, root) for path in data.library_files(root)}
    assert len(found & set(data.CANDIDATE_PACKAGES)) >= data.NUM_PACKAGES
    assert not set(data.CANDIDATE_PACKAGES) & set(data.KEYWORDS)
