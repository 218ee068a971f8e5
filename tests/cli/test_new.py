"""cola new: recipes that come with cola, and one proposed for a file of rows. Run: pytest tests/cli/test_new.py"""

import json
from pathlib import Path

import pytest
from runs import assert_one_line, cola
from transformers import PreTrainedTokenizerFast

from cola.cli.new import shipped
from cola.recipe.read import read_recipe

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast) -> Path:
    """An empty folder but for a model that has no weights, and some rows."""
    monkeypatch.chdir(tmp_path)
    tokenizer.save_pretrained("model")
    rows = [{"question": f"{i} what <colour> is 'the' sky", "answer": f"blue & {i}"} for i in range(40)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_all_recipes_are_listed_with_their_questions() -> None:
    result = cola("new")
    assert result.exit_code == 0, result.output
    assert set(shipped()) == {path.stem for path in RECIPES.glob("*.yaml")}
    for name, text in shipped().items():
        assert any(
            line.split(maxsplit=1) == [name, text[2 : text.index("?") + 1]] for line in result.stdout.splitlines()
        )


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_a_copy_is_the_recipe_under_its_own_name(name: str, here: Path) -> None:
    result = cola("new", "my study.yaml", "--from", name)
    assert result.exit_code == 0, result.output
    mine, theirs = read_recipe("my study.yaml"), read_recipe(RECIPES / f"{name}.yaml")
    assert mine.name == "my-study"
    assert mine.model_copy(update={"name": name}) == theirs
    assert "cola run 'my study.yaml'" in result.stdout
    assert f"recipes/{name}.yaml" not in Path("my study.yaml").read_text()


def test_a_proposed_recipe_shows_a_row_and_can_be_read_again(here: Path) -> None:
    result = cola("new", "deep/mine.yaml", "--data", "rows.jsonl", "--model", "model")
    assert result.exit_code == 0, result.output
    assert "train 1 of 24: rows.jsonl:" in result.stdout
    assert "▸" in result.stdout
    assert result.stdout.splitlines()[-2:] == [
        "  data.answer: by its name",
        "More rows: cola data deep/mine.yaml. To run it: cola run deep/mine.yaml",
    ]
    recipe = read_recipe("deep/mine.yaml")
    assert recipe.data.prompt == "Question: {question}\nAnswer:"
    assert recipe.data.files.train == str(here / "rows.jsonl")  # pyright: ignore[reportOptionalMemberAccess]
    assert recipe.model.name_or_path == str(here / "model")
    assert "# guessed: by its name\n  answer: " in Path("deep/mine.yaml").read_text()


def test_files_beside_the_recipe_are_named_from_it_so_that_the_folder_can_be_moved(here: Path) -> None:
    assert cola("new", "mine.yaml", "--data", here / "rows.jsonl", "--model", "model").exit_code == 0
    assert 'files: "./rows.jsonl"' in Path("mine.yaml").read_text()
    assert 'name_or_path: "./model"' in Path("mine.yaml").read_text()


def test_nothing_is_overwritten_and_a_refusal_leaves_nothing(here: Path) -> None:
    Path("mine.yaml").write_text("mine")
    Path("link.yaml").symlink_to("nowhere.yaml")
    Path("bad.csv").write_text("a,b,c\n1,2,3\n")
    Path("empty.jsonl").touch()
    before = sorted(path.name for path in here.iterdir())
    for words, said in {
        ("mine.yaml",): "mine.yaml is there already",
        ("link.yaml",): "link.yaml is there already",
        ("mine.yaml", "--data", "rows.jsonl", "--model", "model"): "mine.yaml is there already",
        ("quickstart",): "cola new quickstart.yaml",
        ("new.yaml", "--from", "methds"): "did you mean methods?",
        ("--from", "methods"): "name the file to write",
        ("new.yaml", "--model", "model"): "--model goes with --data",
        ("new.yaml", "--from", "methods", "--data", "rows.jsonl"): "give one of them",
        ("new.yaml", "--data", "rows.jsonl", "--model", "./nix"): "./nix: no such folder",
        ("new.yaml", "--data", "rows.jsonl", "--model", ""): "--model: ",
        ("new.yaml", "--data", "nix.jsonl"): "nix.jsonl does not exist",
        ("new.yaml", "--data", "model"): "model is a folder",
        ("new.yaml", "--data", "empty.jsonl"): "empty.jsonl holds no rows",
        ("new.yaml", "--data", "bad.csv"): "its fields (a, b, c) do not say",
    }.items():
        result = cola("new", *words)
        assert_one_line(result)
        assert said in result.stderr
        assert sorted(path.name for path in here.iterdir()) == before
    assert Path("mine.yaml").read_text() == "mine"


def test_a_proposal_that_the_rows_do_not_fit_is_kept_to_be_changed(here: Path) -> None:
    rows = [{"question": "maybe " * 600 + str(i), "answer": "blue"} for i in range(40)]
    Path("long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = cola("new", "mine.yaml", "--data", "long.jsonl", "--model", "model")
    assert result.exit_code == 2
    assert "40 rows longer than 512 tokens" in result.stderr
    assert result.stderr.splitlines()[-1].endswith(
        "mine.yaml is written: change it there, and look again: cola data mine.yaml"
    )
    assert "max_length: 512" in Path("mine.yaml").read_text()
