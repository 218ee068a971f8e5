"""What a recipe says, refuses and means, and that it survives being written down.

Run: pytest tests/recipe/test_recipe.py
"""

import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from cola.compare.ablation import points_of
from cola.errors import LONGEST, MOST_LINES, ColaError, RecipeError, quoted
from cola.recipe.faults import PASTED_KEYS, known_keys
from cola.recipe.plan import plan_arm
from cola.recipe.read import read_recipe
from cola.recipe.recipe import Recipe
from cola.recipe.schema import Search
from cola.recipe.write import dump_recipe

# The line numbers below are counted in this text.
PLAIN = """\
name: plain
model: {name_or_path: some-org/some-model}
data:
  files: rows.jsonl
  rows: {train: 24, validation: 8, test: 16}
  task: answer
  prompt: "{question}?"
  answer: "{answer}"
training:
  epochs: 2
  batch_size: 8
arms:
  lora: {links: 1}
  chain3: {links: 3}
seeds: [0, 1]
"""

Read = Callable[..., Recipe]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    def read_text(text: str, *overrides: str) -> Recipe:
        path = tmp_path / "plain.yaml"
        path.write_text(text)
        return read_recipe(path, list(overrides))

    return read_text


def swap(old: str, new: str) -> str:
    """PLAIN with one passage replaced; the passage is there exactly once."""
    assert PLAIN.count(old) == 1
    return PLAIN.replace(old, new)


def fault(read: Read, text: str, *overrides: str) -> str:
    """What is said about a recipe that is refused."""
    with pytest.raises(RecipeError) as caught:
        read(text, *overrides)
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------------
# YAML


@pytest.mark.parametrize(
    ("text", "line", "column"),
    [
        ("name: plain\nseeds: [0, 1\n", 3, 1),  # the list is still open where the file ends
        ("name: plain\nmodel:\n\tname_or_path: x\n", 3, 1),  # a tab cannot indent
        ("name: plain: twice\n", 1, 12),  # the second colon
        ("name: plain\nmodel: {name_or_path: @x}\n", 2, 23),  # @ begins nothing
        ("name: *nobody\n", 1, 7),
        ("name: a\n---\nname: b\n", 2, 1),
    ],
)
def test_malformed_yaml_is_refused_with_its_line_and_column(read: Read, text: str, line: int, column: int) -> None:
    said = fault(read, text)
    assert f"plain.yaml:{line}:{column}: not valid YAML: " in said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: plain\nmodel:\n\tname_or_path: x\n", "3:1: .* by blanks, not by tabs"),
        ("data:\n  prompt: Say: {what}\n", "2:14: .* a text with a colon in it is written in quotes"),
        ('name: "plain\nseeds: [0]\nmodel: x\n', "1:7: .* the quote that opens here is never closed"),
        ("name: plain\nseeds [0]\nmodel: x\n", "2:1: .* has this line lost its colon"),
    ],
)
def test_what_is_often_wrong_in_yaml_is_said_where_it_begins(read: Read, text: str, said: str) -> None:
    assert re.search(rf"plain\.yaml:{said}", fault(read, text))


@pytest.mark.parametrize("text", ["", "\n\n", "# nothing but a remark\n"])
def test_an_empty_file_is_refused_as_empty(read: Read, text: str) -> None:
    assert "plain.yaml: the file is empty" in fault(read, text)


@pytest.mark.parametrize(("text", "kind"), [("- a\n- b\n", "list"), ("just words\n", "str"), ("17\n", "int")])
def test_a_file_that_is_no_mapping_is_refused(read: Read, text: str, kind: str) -> None:
    assert f"plain.yaml: a recipe is a mapping of keys, this is a {kind}" in fault(read, text)


@pytest.mark.parametrize("tag", ["python/object/apply:os.getcwd []", "python/name:os.system", "python/tuple [1, 2]"])
def test_a_python_tag_is_refused_and_not_executed(read: Read, tag: str) -> None:
    said = fault(read, swap("name: plain", f"name: !!{tag}"))
    assert "plain.yaml:1:7: not valid YAML" in said
    assert "could not determine a constructor" in said


def test_a_python_tag_in_an_override_is_refused_too(read: Read) -> None:
    assert "not valid YAML" in fault(read, PLAIN, "name=!!python/object/apply:os.getcwd []")


def test_a_missing_file_names_the_file_that_was_meant(tmp_path: Path) -> None:
    (tmp_path / "quickstart.yaml").write_text(PLAIN)
    with pytest.raises(RecipeError, match=r"quickstrat\.yaml: no such recipe; did you mean .*/quickstart\.yaml\?$"):
        read_recipe(tmp_path / "quickstrat.yaml")


def test_a_missing_file_with_no_like_name_beside_it_makes_no_guess(tmp_path: Path) -> None:
    (tmp_path / "quickstart.yaml").write_text(PLAIN)
    with pytest.raises(RecipeError, match=r"zebra\.yaml: no such recipe; cola new lists recipes and writes one$"):
        read_recipe(tmp_path / "zebra.yaml")


def test_a_missing_folder_is_told_like_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no such recipe; cola new"):
        read_recipe(tmp_path / "nowhere" / "plain.yaml")


def test_a_folder_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be read"):
        read_recipe(tmp_path)


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "binary.yaml"
    path.write_bytes(b"name: \xff\xfe\n")
    with pytest.raises(RecipeError, match=r"binary\.yaml: cannot be read"):
        read_recipe(path)


@pytest.mark.parametrize(
    ("old", "new", "line", "key"),
    [
        ("name: plain\n", "name: plain\nname: other\n", 2, "name"),
        ("  batch_size: 8\n", "  batch_size: 8\n  epochs: 3\n", 12, "training.epochs"),
        ("  lora: {links: 1}\n", "  lora: {links: 1}\n  lora: {links: 2}\n", 14, "arms.lora"),
        ("{links: 1}", "{links: 1, rank: 4, rank: 8}", 13, "arms.lora.rank"),
    ],
)
def test_a_key_given_twice_is_refused_at_its_second_place(read: Read, old: str, new: str, line: int, key: str) -> None:
    assert f"plain.yaml:{line}: {key} is given twice" in fault(read, swap(old, new))


@pytest.mark.parametrize(
    ("written", "number"),
    [("1e-4", 1e-4), ("1E-4", 1e-4), ("2.5e-3", 2.5e-3), ("+3e-2", 3e-2), (".5e-3", 5e-4), ("5.e-4", 5e-4), ("1", 1.0)],
)
def test_a_learning_rate_is_a_number_however_it_is_written(read: Read, written: str, number: float) -> None:
    assert read(swap("batch_size: 8", f"learning_rate: {written}")).training.learning_rate == number
    assert read(PLAIN, f"training.learning_rate={written}").training.learning_rate == number


def test_a_whole_number_with_zeros_before_it_is_no_octal_one(read: Read) -> None:
    assert read(PLAIN, "seeds=[08, 010, -0]").seeds == [8, 10, 0]


@pytest.mark.parametrize("word", ["yes", "no", "on", "off", "Yes", "No", "YES", "y", "n"])
def test_yes_and_no_are_words(read: Read, word: str) -> None:
    data = f"task: multiple_choice\n  choices: {{{word}: {word}, maybe: Maybe}}\n  label: gold"
    recipe = read(swap('task: answer\n  prompt: "{question}?"\n  answer: "{answer}"', f'{data}\n  prompt: "{{q}}"'))
    assert recipe.data.choices == {word: word, "maybe": "Maybe"}


@pytest.mark.parametrize("texts", [["12:30", "13:00"], ["1_000", "2_000"], ["2024-01-01", "2024-02-01"]])
def test_times_dates_and_numbers_with_underscores_stay_as_they_are_written(read: Read, texts: list[str]) -> None:
    data = f"task: multiple_choice\n  choices: [{', '.join(texts)}]\n  label: gold"
    recipe = read(swap('task: answer\n  prompt: "{question}?"\n  answer: "{answer}"', f'{data}\n  prompt: "{{q}}"'))
    assert recipe.data.choices == texts


def test_true_and_false_stay_booleans_and_give_lower_case_labels(read: Read) -> None:
    data = "task: multiple_choice\n  choices: {true: Yes, False: No}\n  label: gold\n  chat: true"
    recipe = read(swap('task: answer\n  prompt: "{question}?"\n  answer: "{answer}"', f'{data}\n  prompt: "{{q}}"'))
    assert recipe.data.choices == {"true": "Yes", "false": "No"}
    assert recipe.data.chat is True


def test_wandb_off_is_the_word_off(read: Read) -> None:
    assert read(PLAIN + "tracking: {wandb: off}\n").tracking.wandb == "off"
    assert read(PLAIN, "tracking.wandb=off").tracking.wandb == "off"


def test_anchors_and_merge_keys_work(read: Read) -> None:
    text = swap(
        "  lora: {links: 1}\n  chain3: {links: 3}\n", "  a: &a {rank: 4, dropout: 0.5}\n  b: {<<: *a, rank: 2}\n"
    )
    recipe = read(text)
    assert [(arm.rank, arm.dropout) for arm in recipe.arms.values()] == [(4, 0.5), (2, 0.5)]


# ---------------------------------------------------------------------------------------------------------
# Keys


@pytest.mark.parametrize(
    ("old", "new", "line", "key", "meant"),
    [
        ("seeds:", "sedes:", 15, "sedes", "seeds"),
        ("epochs: 2", "epoch: 2", 10, "training.epoch", "epochs"),
        ("batch_size: 8", "batchsize: 8", 11, "training.batchsize", "batch_size"),
        ("{links: 3}", "{links: 3, rnk: 4}", 14, "arms.chain3.rnk", "rank"),
        ("{links: 3}", "{links: [{rank: 4}, {dropuot: 0.1}]}", 14, "arms.chain3.links.1.dropuot", "dropout"),
        ("test: 16", "tests: 16", 5, "data.rows.tests", "test"),
        (
            "files: rows.jsonl",
            "files: {train: rows.jsonl, validaton: v.jsonl}",
            4,
            "data.files.validaton",
            "validation",
        ),
        ("batch_size: 8", "learning_rate: {serach: [1, 2]}", 11, "training.learning_rate.serach", "search"),
    ],
)
def test_a_misspelt_key_names_the_line_and_the_key_that_was_meant(
    read: Read, old: str, new: str, line: int, key: str, meant: str
) -> None:
    said = fault(read, swap(old, new)).splitlines()
    assert [s for s in said if f"plain.yaml:{line}: {key}: unknown key; did you mean {meant}?" in s]


def test_a_key_like_no_other_lists_the_keys_that_are_known(read: Read) -> None:
    said = fault(read, swap("  batch_size: 8\n", "  zzz: 8\n"))
    assert (
        "plain.yaml:11: training.zzz: unknown key; known here are epochs, steps, protocol, match, batch_size, " in said
    )


@pytest.mark.parametrize(
    ("old", "new", "line", "key", "home"),
    [
        ("seeds:", "batch_size: 8\nseeds:", 15, "batch_size", "training.batch_size"),
        ("  batch_size: 8\n", "  wandb: off\n", 11, "training.wandb", "tracking.wandb"),
    ],
)
def test_a_key_in_the_wrong_section_names_its_own(
    read: Read, old: str, new: str, line: int, key: str, home: str
) -> None:
    assert f"plain.yaml:{line}: {key}: unknown key here; it belongs at {home}" in fault(read, swap(old, new))


TOP, TRAINING, ARM, DATA = "seeds:", "  batch_size: 8", "{links: 3", "  task: answer"


@pytest.mark.parametrize(
    ("place", "key", "meant"),
    [
        (TOP, "lora_r", "link.rank"),
        (ARM, "lora_r", "link.rank"),
        (ARM, "lora_alpha", "link.alpha"),
        (ARM, "num_links", "links (under an arm)"),
        (TOP, "model_name_or_path", "model.name_or_path"),
        (TOP, "base_model", "model.name_or_path"),
        (TOP, "load_in_4bit", "model.quantization: nf4, or method: qlora under an arm"),
        (TOP, "per_device_train_batch_size", "training.batch_size"),
        (TRAINING, "per_device_train_batch_size", "training.batch_size"),
        (TRAINING, "gradient_accumulation_steps", "training.micro_batch_tokens"),
        (TOP, "num_train_epochs", "training.epochs"),
        (TRAINING, "num_train_epochs", "training.epochs"),
        (TRAINING, "max_steps", "training.steps"),
        (TRAINING, "warmup_ratio", "training.warmup_steps"),
        (TRAINING, "lr", "training.learning_rate"),
        (TRAINING, "gradient_clipping", "training.max_grad_norm"),
        (TOP, "report_to", "tracking.tracker"),
        (TOP, "wandb_project", "tracking.project"),
        (DATA, "cutoff_len", "data.max_length"),
        (DATA, "dataset_name", "data.hub"),
    ],
)
def test_a_key_of_another_tool_is_answered_with_ours(read: Read, place: str, key: str, meant: str) -> None:
    pasted = {TOP: f"{key}: 4\n{TOP}", ARM: f"{ARM}, {key}: 4"}.get(place, f"  {key}: 4\n{place}")
    said = fault(read, swap(place, pasted))
    assert f"{key}: unknown key; here it is {meant}" in said


def test_every_key_that_another_tools_key_is_answered_with_exists() -> None:
    named = [text.split()[0].rstrip(":") for text in PASTED_KEYS.values() if not text.startswith("no key")]
    ours = set(known_keys())
    assert [
        key for key in named if key not in ours and f"link.{key}" not in ours and f"arms.NAME.{key}" not in ours
    ] == []


def test_a_missing_key_is_named(read: Read) -> None:
    assert "plain.yaml:1: seeds: this key is required" in fault(read, swap("seeds: [0, 1]\n", ""))
    assert "plain.yaml:3: data.task: this key is required" in fault(read, swap("  task: answer\n", ""))


def test_every_fault_gets_a_line_of_its_own(read: Read) -> None:
    text = (
        swap("batch_size: 8", "batch_size: -8")
        .replace("seeds: [0, 1]", "seeds: [0, one]")
        .replace("links: 3", "lnks: 3")
    )
    said = fault(read, text).splitlines()
    assert [line.split("plain.yaml:")[1].split(": ")[0:2] for line in said] == [
        ["11", "training.batch_size"],
        ["14", "arms.chain3.lnks"],
        ["15", "seeds.1"],
    ]


# ---------------------------------------------------------------------------------------------------------
# Values


@pytest.mark.parametrize(
    ("old", "new", "line", "key"),
    [
        ("batch_size: 8", "batch_size: eight", 11, "training.batch_size"),
        ("batch_size: 8", "batch_size: 0", 11, "training.batch_size"),
        ("batch_size: 8", "batch_size: 2.5", 11, "training.batch_size"),
        ("epochs: 2", "epochs: -1", 10, "training.epochs"),
        ("batch_size: 8", "learning_rate: 0", 11, "training.learning_rate"),
        ("batch_size: 8", "learning_rate: fast", 11, "training.learning_rate"),
        ("batch_size: 8", "learning_rate: {search: [1e-4]}", 11, "training.learning_rate.search"),
        ("batch_size: 8", "learning_rate: {search: [1e-4, -1]}", 11, "training.learning_rate"),
        ("batch_size: 8", "learning_rate: {search: [1e-4, fast]}", 11, "training.learning_rate"),
        ("{links: 3}", "{rank: {search: [4, 0]}}", 14, "arms.chain3"),
        ("batch_size: 8", "betas: [0.9, 1.0]", 11, "training.betas.1"),
        ("batch_size: 8", "schedule: polynomial", 11, "training.schedule"),
        ("{links: 3}", "{links: -1}", 14, "arms.chain3.links"),
        ("{links: 3}", "{links: three}", 14, "arms.chain3.links"),
        ("{links: 3}", "{rank: 0}", 14, "arms.chain3.rank"),
        ("{links: 3}", "{dropout: 1.0}", 14, "arms.chain3.dropout"),
        ("{links: 3}", "{links: [{steps: 0}]}", 14, "arms.chain3.links.0.steps"),
        ("{links: 3}", "{target_modules: []}", 14, "arms.chain3.target_modules"),
        ("{links: 3}", "{method: dora}", 14, "arms.chain3.method"),
        ("seeds: [0, 1]", "seeds: 0", 15, "seeds"),
        ("seeds: [0, 1]", "seeds: []", 15, "seeds"),
        ("seeds: [0, 1]", "seeds: [0, -1]", 15, "seeds.1"),
        ("task: answer", "task: translation", 6, "data.task"),
    ],
)
def test_a_value_of_the_wrong_kind_or_size_is_refused_at_its_line(
    read: Read, old: str, new: str, line: int, key: str
) -> None:
    assert f"plain.yaml:{line}: {key}: " in fault(read, swap(old, new))


@pytest.mark.parametrize("key", ["training.learning_rate", "training.epochs", "training.weight_decay", "link.alpha"])
@pytest.mark.parametrize("number", [".inf", ".nan"])
def test_an_infinite_number_is_refused(read: Read, key: str, number: str) -> None:
    assert key in fault(read, PLAIN, f"{key}={number}")


@pytest.mark.parametrize("name", ["../escape", "a/b", ".hidden", "", "two words"])
def test_a_name_that_is_no_file_name_is_refused(read: Read, name: str) -> None:
    assert "plain.yaml:1: name: " in fault(read, swap("name: plain", f"name: {name!r}"))
    assert "arms" in fault(read, swap("lora: {links: 1}", f"{name!r}: {{links: 1}}"))


def test_a_wrong_value_is_shown(read: Read) -> None:
    assert fault(read, swap("batch_size: 8", "batch_size: eight")).endswith("; got 'eight'")


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("epochs: 2", "epochs: 2\n  steps: 10", "as epochs or as steps, one of them"),
        ("epochs: 2", "epochs: null", "as epochs or as steps, one of them"),
        ("links: 3", "links: [{steps: 3, epochs: 1}]", "as epochs or as steps, one of them"),
        ("epochs: 2", "epochs: 2\n  warmup_steps: 2.5", "warmup_steps is a whole number, or a fraction below 1"),
        ("seeds: [0, 1]", "seeds: [0, 1, 0]", "each seed once"),
        ("{links: 3}", "{method: full, links: 3}", "full fine-tuning has no knot to tie, so it takes links: 1, not 3"),
        ("{links: 3}", "{links: [{method: full}, {}]}", "full fine-tuning has no knot to tie"),
        ("{links: 3}", "{method: full, rank: 4}", "arms.chain3.rank has no effect with method full"),
        ("{links: 3}", "{method: full, alpha: 4}", "arms.chain3.alpha has no effect with method full"),
        ("{links: 3}", "{method: full, dropout: 0.1}", "arms.chain3.dropout has no effect with method full"),
        (
            "{links: 3}",
            "{method: full, target_modules: [q]}",
            "arms.chain3.target_modules has no effect with method full",
        ),
        ("{links: 3}", "{links: [{method: full, rank: 4}]}", "arms.chain3.rank has no effect with method full"),
        ("{links: 3}", "{rank: 4, links: [{method: full}]}", "arms.chain3.rank has no effect with method full"),
        (
            "{links: 3}",
            "{method: full, optimizer: riemannian}",
            "arms.chain3.optimizer: riemannian trains the two factors",
        ),
        ("{links: 3}", "{links: 0, rank: 4}", "trains nothing, so 'rank' has no effect"),
        ("{links: 3}", "{links: [], learning_rate: 1}", "trains nothing, so 'learning_rate' has no effect"),
        ("{links: 3}", "{links: [{learning_rate: {search: [1, 2]}}]}", "for the whole arm, not for one link"),
        (
            "{links: 3}",
            "{learning_rate: {search: [1, 2]}, links: [{learning_rate: 1}, {}]}",
            "a link's own learning_rate and a search exclude each other",
        ),
        (
            "{links: 3}",
            "{rank: {search: [1, 2]}, links: [{rank: 1}, {}]}",
            "a link's own rank and a search exclude each other",
        ),
        ("{links: 3}", "{rank: 4, search: {rank: [1, 2]}}", "search: rank has a value of its own too"),
        ("{links: 3}", "{search: {method: [lora, full]}}", "search: 'method' cannot be searched; these can: links, "),
        ("  files: rows.jsonl\n", "", "exactly one source, hub, files or reasoning_gym; none is given"),
        ("  files: rows.jsonl\n", "  files: r.jsonl\n  hub: x\n", "given are hub and files"),
        ('  answer: "{answer}"\n', "", "task answer needs the key 'answer'"),
        ("  task: answer\n", "  task: text\n", "task text needs the key 'text'"),
        ("  task: answer\n", "  task: answer\n  label: gold\n", "'label' has no effect with task answer"),
        ("  task: answer\n", "  task: answer\n  system: Be brief.\n", "system has no effect without chat: true"),
        ("  task: answer\n", "  task: answer\n  too_long: split\n", "too_long: split is for task text"),
        ("seeds:", "comparison: {primary: [chain3, lroa]}\nseeds:", "names the arm 'lroa'; the arms are lora, chain3"),
    ],
)
def test_keys_that_contradict_each_other_are_refused(read: Read, old: str, new: str, reason: str) -> None:
    assert reason in fault(read, swap(old, new))


@pytest.mark.parametrize(
    ("choices", "reason"),
    [("[only]", "two answers or more"), ("{a: only}", "two answers or more"), ("options", None)],
)
def test_a_multiple_choice_needs_something_to_choose_from(read: Read, choices: str, reason: str | None) -> None:
    text = swap('  task: answer\n  prompt: "{question}?"\n  answer: "{answer}"\n', "  task: multiple_choice\n")
    text = text.replace("multiple_choice\n", f"multiple_choice\n  prompt: p\n  label: gold\n  choices: {choices}\n")
    if reason:
        assert reason in fault(read, text)
    else:
        assert read(text).data.choices == "options"


def test_searched_arms_with_unequal_trials_are_refused(read: Read) -> None:
    text = swap("{links: 1}", "{learning_rate: {search: [1e-4, 1e-3]}}").replace(
        "{links: 3}", "{links: 3, learning_rate: {search: [1e-4, 2e-4, 1e-3]}}"
    )
    said = fault(read, text)
    assert "same number of trials" in said
    assert "2 for lora; 3 for chain3" in said


def test_more_seeds_make_up_for_a_smaller_grid_in_the_count_of_trials(read: Read) -> None:
    one = "{learning_rate: {search: [1, 2, 3], seeds: [0, 1]}}"
    other = "{learning_rate: {search: [1, 2], seeds: [0, 1, 2]}}"
    recipe = read(swap("{links: 1}", one).replace("{links: 3}", other))
    assert recipe.learning_rate_of("lora") == Search(search=[1, 2, 3], seeds=[0, 1])
    assert recipe.learning_rate_of("chain3") == Search(search=[1, 2], seeds=[0, 1, 2])


def test_an_arm_that_is_not_searched_has_one_trial_and_an_arm_without_links_has_none(read: Read) -> None:
    text = swap("{links: 1}", "{learning_rate: 1e-3}") + "link: {learning_rate: {search: [1, 2]}}\n"
    said = fault(read, text.replace("seeds:", "  base: {links: 0}\nseeds:"))
    assert "every arm must have the same number of trials" in said
    assert "1 for lora; 2 for chain3: give each a search" in said
    recipe = read(text.replace("  lora: {learning_rate: 1e-3}\n", "  base: {links: 0}\n"))
    assert recipe.learning_rate_of("chain3") == Search(search=[1, 2], seeds=[1000])
    assert recipe.searches_of("base") == {}


def test_a_search_says_in_the_resolved_recipe_on_which_seeds_by_what_and_for_whom_it_chooses(read: Read) -> None:
    text = swap("batch_size: 8", "learning_rate: {search: [1, 2]}")
    said = yaml.safe_load(dump_recipe(read(text)))
    whole = {"search": [1, 2], "seeds": [1000], "select_by": "loss", "per": "arm"}
    assert said["arms"]["lora"]["learning_rate"] == said["training"]["learning_rate"] == whole
    each = text.replace("[1, 2]}", "[1, 2], per: seed, select_by: score}")
    said = yaml.safe_load(dump_recipe(read(each)))
    assert said["arms"]["lora"]["learning_rate"] == {"search": [1, 2], "select_by": "score", "per": "seed"}


@pytest.mark.parametrize(
    ("lora", "chain3", "reason"),
    [
        ("[1, 2], seeds: [0], per: seed", "[1, 2]", "seeds has no effect with per: seed"),
        (
            "[1, 2], per: seed",
            "[1, 2]",
            "every arm's search must have the same per and select_by; there are lora: per seed, by loss; chain3: per "
            "arm, by loss",
        ),
        ("[1, 2]", "[1, 2], select_by: score", "lora: per arm, by loss; chain3: per arm, by score"),
        (
            "[1, 2]}, rank: {search: [1, 2], per: seed",
            "[1, 2]",
            "arms.lora: all its keys are searched with the same per",
        ),
        (
            "[1, 2], per: seed}, links: {search: [1, 2], per: seed",
            "[1, 2]",
            "arms.lora.links: an arm has one number of",
        ),
    ],
)
def test_searches_that_do_not_go_together_are_refused(read: Read, lora: str, chain3: str, reason: str) -> None:
    text = swap("{links: 1}", f"{{learning_rate: {{search: {lora}}}}}")
    text = text.replace("{links: 3}", f"{{links: 3, learning_rate: {{search: {chain3}}}}}")
    assert reason in fault(read, text)


def test_no_more_training_rows_are_scored_than_are_drawn(read: Read) -> None:
    assert read(PLAIN, "evaluation.train_rows=24").evaluation.train_rows == 24
    said = fault(read, PLAIN, "evaluation.train_rows=25")
    assert "evaluation.train_rows: 25 training rows are to be scored and data.rows.train has 24; lower it" in said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("evaluation", "{select_by: score}"),
        ("link", "{learning_rate: {search: [1, 2], select_by: score}}"),
        ("comparison", "{metric: score}"),
    ],
)
def test_what_a_text_has_none_of_decides_nothing(read: Read, key: str, value: str) -> None:
    text = swap("task: answer", "task: text\n  text: t").replace('  prompt: "{question}?"\n  answer: "{answer}"\n', "")
    assert "a text has no score; say loss, or leave it out" in fault(read, f"{text}{key}: {value}\n")
    assert read(text + f"{key}: {value.replace('score', 'loss')}\n")


def test_rows_that_each_seed_draws_are_counted(read: Read) -> None:
    text = swap("train: 24, ", "").replace("task: answer", "task: answer\n  redraw: per_seed")
    assert "redraw: per_seed needs rows.train" in fault(read, text)


def test_every_combination_of_an_arms_searches_is_a_trial_whatever_the_order_they_are_written_in(read: Read) -> None:
    one = "{rank: {search: [4, 8]}, links: {search: [1, 3]}}"
    other = "{search: {links: [1, 3], rank: {search: [4, 8]}}}"
    recipe = read(swap("{links: 1}", one).replace("{links: 3}", other))
    assert recipe.choices_of("lora") == recipe.choices_of("chain3")
    assert recipe.choices_of("lora") == [(("links", links), ("rank", rank)) for links in (1, 3) for rank in (4, 8)]


def test_a_searched_value_means_what_it_means_where_it_is_written_alone(read: Read) -> None:
    arm = "{target_modules: {search: [q_proj, all-linear]}, use_rslora: {search: [true, false]}}"
    recipe = read(swap("  lora: {links: 1}\n  chain3: {links: 3}\n", f"  lora: {arm}\n"))
    links = [variant.links[0] for variant in recipe.variants("lora")]
    assert [(link.target_modules, link.use_rslora) for link in links] == [
        (("q_proj",), True),
        (("q_proj",), False),
        ("all-linear", True),
        ("all-linear", False),
    ]


def test_an_alpha_beside_another_rank_is_not_taken_over_by_a_rank_that_is_searched(read: Read) -> None:
    text = swap("  lora: {links: 1}\n  chain3: {links: 3}\n", "  lora: {rank: {search: [2, 8]}}\n")
    for link, alphas in (("{rank: 4, alpha: 5}", [4, 16]), ("{rank: 4, alpha: 1r}", [2, 8])):
        recipe = read(text + f"link: {link}\n")
        chosen = [variant.links[0] for variant in recipe.variants("lora")]
        assert [link.alpha for link in chosen] == alphas


# ---------------------------------------------------------------------------------------------------------
# What the keys mean


@pytest.mark.parametrize(
    ("link", "arm", "expected"),
    [
        ("{}", "{}", [(8, 16)]),
        ("{rank: 4}", "{}", [(4, 8)]),
        ("{}", "{rank: 4}", [(4, 8)]),
        ("{}", "{links: [{rank: 4}]}", [(4, 8)]),
        ("{rank: 4, alpha: 5}", "{}", [(4, 5)]),
        ("{rank: 4}", "{rank: 2}", [(2, 4)]),
        ("{rank: 4, alpha: 5}", "{rank: 2}", [(2, 4)]),  # the alpha 5 belongs to the rank 4
        ("{rank: 4, alpha: 5}", "{links: [{rank: 16}, {}, {rank: 1}]}", [(16, 32), (4, 5), (1, 2)]),
        ("{rank: 4}", "{alpha: 3}", [(4, 3)]),
        ("{alpha: 3}", "{}", [(8, 3)]),
        ("{}", "{rank: 16, links: [{}, {rank: 8}, {alpha: 1}]}", [(16, 32), (8, 16), (16, 1)]),
    ],
)
def test_alpha_is_twice_the_rank_wherever_the_rank_is_given(
    read: Read, link: str, arm: str, expected: list[tuple[int, float]]
) -> None:
    recipe = read(swap("{links: 3}", arm) + f"link: {link}\n")
    assert [(x.rank, x.alpha) for x in recipe.resolved("chain3").links] == expected


def test_a_setting_nearer_to_the_link_wins(read: Read) -> None:
    text = swap("{links: 3}", "{dropout: 0.2, links: [{dropout: 0.3}, {}]}").replace("{links: 1}", "{}")
    recipe = read(text + "link: {dropout: 0.1, target_modules: q_proj}\n")
    assert [link.dropout for link in recipe.resolved("chain3").links] == [0.3, 0.2]
    assert [link.dropout for link in recipe.resolved("lora").links] == [0.1]
    assert recipe.resolved("lora").links[0].target_modules == ("q_proj",)


def test_settings_of_all_pairs_do_not_reach_full_fine_tuning(read: Read) -> None:
    recipe = read(
        swap("{links: 3}", "{method: full}") + "link: {rank: 4, alpha: 2, dropout: 0.1, learning_rate: 0.5}\n"
    )
    (link,) = recipe.resolved("chain3").links
    assert link.record() == {"method": "full", "freeze": []}
    assert recipe.learning_rate_of("chain3") == 0.5


@pytest.mark.parametrize(
    ("prompt", "chat", "prefix"),
    [("{q}?", False, " "), ("{q}:\\n", False, ""), ("{q} ", False, ""), ("{q}?", True, "")],
)
def test_one_space_stands_before_an_answer_unless_something_else_does(
    read: Read, prompt: str, chat: bool, prefix: str
) -> None:
    recipe = read(swap('prompt: "{question}?"', f'prompt: "{prompt}"\n  chat: {str(chat).lower()}'))
    assert recipe.data.answer_prefix == prefix


def test_too_long_texts_are_split_and_too_long_rows_dropped_by_default(read: Read) -> None:
    text = swap('task: answer\n  prompt: "{question}?"\n  answer: "{answer}"', 'task: text\n  text: "{text}"')
    assert read(text).data.too_long == "split"
    assert read(PLAIN).data.too_long == "drop"


def test_a_file_is_looked_for_here_and_then_beside_the_recipe(
    read: Read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    (tmp_path / "rows.jsonl").write_text("{}\n")
    files = read(PLAIN).data.files
    assert files is not None
    assert [files.train, files.validation, files.test] == [str(tmp_path / "rows.jsonl")] * 3
    (elsewhere / "rows.jsonl").write_text("{}\n")
    files = read(PLAIN, "data.files.test=rows.jsonl").data.files
    assert files is not None
    assert files.test == str(elsewhere / "rows.jsonl")


def test_a_recipe_cannot_be_changed_once_it_is_read(read: Read) -> None:
    with pytest.raises(ValueError, match="frozen"):
        read(PLAIN).name = "other"


# ---------------------------------------------------------------------------------------------------------
# Overrides


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("training.batch_size=4", "training.batch_size", 4),
        ("training.weight_decay=1e-2", "training.weight_decay", 0.01),
        ("training.betas=[0.8, 0.9]", "training.betas", (0.8, 0.9)),
        ("model.revision=main", "model.revision", "main"),
        ("evaluation.every=7", "evaluation.every", 7),
        ("output=a=b", "output", "a=b"),  # only the first = divides
        ("data.answer_prefix='= '", "data.answer_prefix", "= "),
        ("seeds=[3]", "seeds", [3]),
        ("seeds.1=5", "seeds", [0, 5]),
        ("data.rows.train=99", "data.rows.train", 99),
        ("data.rows.train=null", "data.rows.train", None),
        ("data.rows.train=", "data.rows.train", None),
    ],
)
def test_an_override_sets_one_key(read: Read, override: str, key: str, value: object) -> None:
    found: object = read(PLAIN, override)
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value


def test_a_setting_of_all_links_is_written_out_into_the_arms(read: Read) -> None:
    recipe = read(PLAIN, "link.rank=2")
    assert {recipe.arms[name].rank for name in ("lora", "chain3")} == {2}
    assert recipe.link.rank is None


def test_overrides_reach_into_lists_by_index(read: Read) -> None:
    text = swap("{links: 3}", "{links: [{rank: 4}, {rank: 2}]}")
    recipe = read(text, "arms.chain3.links.1.rank=16", "arms.chain3.links.0={rank: 32}")
    assert [link.rank for link in recipe.resolved("chain3").links] == [32, 16]


def test_an_override_of_null_removes_an_arm_and_a_mapping_adds_one(read: Read) -> None:
    recipe = read(PLAIN, "arms.lora=null", "arms.wide={rank: 64}", "arms.wide.dropout=0.1")
    assert list(recipe.arms) == ["chain3", "wide"]
    assert (recipe.arms["wide"].rank, recipe.arms["wide"].dropout) == (64, 0.1)


@pytest.mark.parametrize(
    ("override", "source"),
    [
        ("data.hub=some/set", "hub"),
        ("data.hub.name=some/set", "hub"),
        ("data.reasoning_gym=chain_sum", "reasoning_gym"),
        ("data.reasoning_gym={name: chain_sum, seed: 3}", "reasoning_gym"),
        ("data.files=other.jsonl", "files"),
    ],
)
def test_an_override_of_the_data_source_replaces_the_other_source(read: Read, override: str, source: str) -> None:
    for text in (PLAIN, swap("files: rows.jsonl", "hub: first/set")):
        data = read(text, override).data
        assert [name for name in ("hub", "files", "reasoning_gym") if getattr(data, name) is not None] == [source]


def test_a_source_given_by_its_name_alone_can_be_overridden_key_by_key(read: Read) -> None:
    files = read(PLAIN, "data.files.test=held-out.jsonl").data.files
    assert files is not None
    assert [Path(path).name for path in (files.train, files.test or "")] == ["rows.jsonl", "held-out.jsonl"]
    hub = read(swap("files: rows.jsonl", "hub: some/set"), "data.hub.config=easy").data.hub
    assert hub is not None
    assert (hub.name, hub.config) == ("some/set", "easy")


def test_epochs_and_steps_replace_one_another(read: Read) -> None:
    training = read(PLAIN, "training.steps=70").training
    assert (training.steps, training.epochs) == (70, None)
    training = read(PLAIN, "training.steps=70", "training.epochs=0.5").training
    assert (training.steps, training.epochs) == (None, 0.5)
    recipe = read(swap("{links: 3}", "{links: [{epochs: 1}, {}]}"), "arms.chain3.links.0.steps=4")
    assert isinstance(recipe.arms["chain3"].links, list)
    link = recipe.arms["chain3"].links[0]
    assert (link.steps, link.epochs) == (4, None)


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("training.epochs", "write dotted.key=value"),
        ("=3", "write dotted.key=value"),
        ("", "write dotted.key=value"),
        ("training.epochs=[1", "not valid YAML"),
        ("data.prompt={question} =", "text with braces or colons is quoted for YAML too: \"data.prompt='...'\""),
        ("training.epoch=3", "training.epoch: unknown key; did you mean epochs?"),
        ("lora_r=4", "lora_r: unknown key; here it is link.rank"),
        ("name.first=x", "name has no keys below it"),
        ("training.batch_size.x=1", "training.batch_size has no keys below it"),
        ("seeds.7=1", "7 is no place in a list of 2; they count from 0"),
        ("seeds.first=1", "first is no place in a list of 2"),
        ("seeds.-1=1", "-1 is no place in a list of 2"),
        ("seeds.0.x=1", "seeds.0"),
        ("seeds.0.x.y=1", "seeds.0"),
        ("arms.lroa=null", "there is no such arm; the arms are lora, chain3; did you mean lora?"),
        (
            "data.prompt=Ask: {q}",
            "a mapping to YAML; a text with a colon or braces is written in two pairs of quotes, ",
        ),
        ("training.epochs=many", "training.epochs: input should be a valid number"),
        ("training..epochs=1", "training."),
    ],
)
def test_an_override_that_makes_no_sense_is_refused(read: Read, override: str, reason: str) -> None:
    assert reason in fault(read, PLAIN, override)


@pytest.mark.parametrize("override", ["training.epochs=many", "training.epoch=3", "training={epochs: many}"])
def test_a_fault_of_an_override_is_not_blamed_on_a_line_of_the_file(read: Read, override: str) -> None:
    assert "plain.yaml (override): training.epoch" in fault(read, PLAIN, override)


# ---------------------------------------------------------------------------------------------------------
# Written down and read back

HUB = "hub: {name: some/set, config: easy, revision: abc, test: held_out}"
CHOICE = 'task: multiple_choice\n  prompt: "{q}"\n  label: gold\n  choices: '


@pytest.mark.parametrize(
    ("old", "new", "more"),
    [
        pytest.param("", "", "", id="plain"),
        pytest.param("batch_size: 8", "learning_rate: {search: [1e-4, 2e-4], seeds: [0, 7]}", "", id="searched"),
        pytest.param(
            "  lora: {links: 1}\n  chain3: {links: 3}\n",
            "  lora: {learning_rate: {search: [1e-4, 2e-4]}}\n  wide: {search: {rank: [8, 64]}}\n"
            "  chain: {links: {search: [2, 3]}}\n  chain3: {links: 3, init: {search: [default, orthogonal]}}\n",
            "",
            id="searched-by-each-arm",
        ),
        pytest.param(
            "{links: 3}", "{links: [{rank: 8, steps: 3}, {rank: 2, learning_rate: 0.1}]}", "", id="list-of-links"
        ),
        pytest.param("{links: 3}", "{rank: 2, alpha: 9, links: [{}, {rank: 3}]}", "", id="list-below-an-arms-settings"),
        pytest.param("{links: 3}", "{links: []}", "", id="no-links"),
        pytest.param("{links: 3}", "{links: 0}", "", id="base"),
        pytest.param("{links: 3}", "{method: full, learning_rate: 1e-5}", "", id="full"),
        pytest.param("{links: 3}", "{links: [{method: full, steps: 3}]}", "", id="full-in-a-list"),
        pytest.param("{links: 3}", "{target_modules: q_proj}", "", id="one-module"),
        pytest.param("", "", "link: {rank: 4, alpha: 3, learning_rate: 0.5}\n", id="settings-for-all-links"),
        pytest.param("", "", "link: {learning_rate: {search: [1, 2]}}\n", id="searched-by-all-links"),
        pytest.param("files: rows.jsonl", HUB, "", id="hub"),
        pytest.param("files: rows.jsonl", "hub: some/set", "", id="hub-by-name"),
        pytest.param("files: rows.jsonl", "files: {train: a.csv, test: b.csv}", "", id="files"),
        pytest.param(
            "files: rows.jsonl", "reasoning_gym: {name: n, seed: 3, options: {a: [1, x], b: {c: true}}}", "", id="gym"
        ),
        pytest.param("files: rows.jsonl", "reasoning_gym: {name: n, options: {limit: null}}", "", id="gym-null-option"),
        pytest.param("batch_size: 8", "max_grad_norm: null", "", id="no-clipping"),
        pytest.param("batch_size: 8", "warmup_steps: 0.1", "knot: {schedule: link, warmup_steps: 3}\n", id="warm-up"),
        pytest.param("{links: 3}", "{links: 3, knot: {merge: naive, schedule: link}}", "", id="an-arms-own-knots"),
        pytest.param("{links: 3}", "{links: 3, knot: {optimizer: {prune_random: 0.5}}}", "", id="pruned"),
        pytest.param("epochs: 2", "epochs: 2\n  match: flops", "", id="matched-by-flops"),
        pytest.param("epochs: 2", "steps: 17", "", id="steps"),
        pytest.param('prompt: "{question}?"', 'prompt: "{question}: "', "", id="prompt-that-ends-in-a-space"),
        pytest.param("task: answer", "task: answer\n  chat: true\n  system: 'Ünï: \"#\\n'", "", id="chat"),
        pytest.param("task: answer", "task: answer\n  normalize: []", "", id="nothing-ignored"),
        pytest.param("name: plain", 'name: "1e5"', "", id="name-like-a-number"),
        pytest.param("seeds:", "comparison: {primary: [chain3, lora], lora: chain3}\nseeds:", "", id="primary"),
        pytest.param("seeds:", "evaluation: {every: 5, checkpoint: best, select_by: score}\nseeds:", "", id="every-5"),
        pytest.param("seeds:", "tracking: {wandb: off, entity: us}\noutput: ~/runs\nseeds:", "", id="tracking"),
    ],
)
def test_a_recipe_that_is_written_down_reads_back_as_the_same_recipe(
    read: Read, tmp_path: Path, old: str, new: str, more: str
) -> None:
    recipe = read((swap(old, new) if old else PLAIN) + more)
    again = tmp_path / "run" / "recipe.yaml"
    again.parent.mkdir()
    again.write_text(dump_recipe(recipe))
    assert read_recipe(again) == recipe


@pytest.mark.parametrize(
    "choices",
    [
        "{yes: Yes, no: No}",
        "{true: Yes, false: No}",
        "[0, 1, 2.5]",
        "['1e-4', '1e-5']",
        "['null', '~', '0x1']",
        "field",
    ],
)
def test_choices_read_back_as_the_same_texts(read: Read, tmp_path: Path, choices: str) -> None:
    recipe = read(swap('task: answer\n  prompt: "{question}?"\n  answer: "{answer}"', CHOICE + choices))
    again = tmp_path / "again.yaml"
    again.write_text(dump_recipe(recipe))
    assert read_recipe(again).data.choices == recipe.data.choices


def test_a_written_recipe_says_every_default(read: Read) -> None:
    tree = yaml.safe_load(dump_recipe(read(PLAIN)))
    assert tree["arms"]["chain3"] == {
        "links": 3,
        "method": "lora",
        "rank": 8,
        "alpha": 16,
        "dropout": 0,
        "target_modules": "all-linear",
        "init": "default",
        "use_rslora": False,
        "use_dora": False,
        "loraplus_lr_ratio": 1,
        "learning_rate": 2e-4,
    }
    assert tree["knot"] == {
        "merge": "exact",
        "pair": "fresh",
        "merge_fraction": 1,
        "optimizer": "fresh",
        "schedule": "run",
    }
    assert tree["training"]["schedule"] == "linear"
    assert tree["data"]["too_long"] == "drop"


def test_the_recipes_of_this_repository_can_be_read() -> None:
    paths = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
    assert paths
    for path in paths:
        assert read_recipe(path).arms


def test_a_search_over_links_of_a_list_sets_the_value_of_each(read: Read) -> None:
    arms = "{lora: {links: [{epochs: 1}, {epochs: 1}], rank: {search: [2, 16]}}}"
    recipe = read(PLAIN, f"arms={arms}", "comparison={}", "training.epochs=2", "link.alpha=2r")
    chosen = [variant.links for variant in recipe.variants("lora")]
    assert [[(link.rank, link.alpha) for link in links] for links in chosen] == [[(2, 4)] * 2, [(16, 32)] * 2]
    assert read(dump_recipe(recipe)) == recipe


def test_arms_cannot_be_matched_to_one_whose_cost_is_searched(read: Read) -> None:
    arms = "{lora: {rank: {search: [2, 16]}}, full: {method: full, learning_rate: {search: [1e-3, 1e-4]}}}"
    with pytest.raises(RecipeError, match="whose rank is searched"):
        read(PLAIN, f"arms={arms}", "comparison={}", "training.match=flops")
    read(PLAIN, f"arms={arms.replace('rank', 'learning_rate')}", "comparison={}", "training.match=flops")


@pytest.mark.parametrize("links", ["[{alpha: 4}, {alpha: 8}]", "[{}, {use_rslora: true}]", "[{rank: 4}, {rank: 8}]"])
def test_a_pair_that_is_kept_keeps_its_scale(read: Read, links: str) -> None:
    with pytest.raises(RecipeError, match=r"knot\.pair: link 2 has .* so the pair before does not fit it"):
        read(PLAIN, f"arms.chain3={{links: {links}, knot: {{pair: keep}}}}")


# ---------------------------------------------------------------------------------------------------------
# Aliases, bounds, and what YAML takes for no text

SHARED = swap(
    "  lora: {links: 1}\n  chain3: {links: 3}\n",
    "  chain3: {links: [&link {rank: 8}, *link, *link]}\n  one: &arm {rank: 4}\n  other: *arm\n"
    "  merged: {<<: *arm, dropout: 0.5}\n",
)


def test_an_override_changes_the_place_that_it_names_and_no_other_alias(read: Read) -> None:
    recipe = read(SHARED, "arms.chain3.links.2.rank=2", "arms.one.rank=16", "arms.merged.rank=3")
    assert [link.rank for link in recipe.resolved("chain3").links] == [8, 8, 2]
    assert {name: recipe.arms[name].rank for name in ("one", "other", "merged")} == {"one": 16, "other": 4, "merged": 3}
    assert recipe.arms["merged"].dropout == 0.5


def test_aliases_that_stand_for_too_much_end_in_one_line_at_once(read: Read) -> None:
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12))
    began = time.process_time()
    assert "values, aliases counted" in fault(read, PLAIN + bomb)
    assert "*loop is inside itself" in fault(read, PLAIN + "more: &loop [*loop]\n")
    assert "lists and mappings in another" in fault(read, PLAIN + f"more: {'[' * 2000}\n")
    assert time.process_time() - began < 60  # of CPU, on any machine: written out, they are 10^11 values


@pytest.mark.parametrize("override", ["evaluation.every=[epoch, epoch]", "seeds={}", "model=[]", "arms.lora=[[]]"])
def test_no_fault_is_told_in_no_words(read: Read, override: str) -> None:
    assert "plain.yaml (override): " + override.split("=")[0] in fault(read, PLAIN, override)


def test_a_value_of_several_kinds_names_each_that_it_could_be(read: Read) -> None:
    said = fault(read, PLAIN, "evaluation.every=[epoch, epoch]")
    assert "input should be 'epoch', 'link' or 'never' or a valid integer; got ['epoch', 'epoch']" in said
    assert "\n" not in said


HUGE = "1" + "0" * 30
BOUNDED = [
    key for key in known_keys() if re.search(r"rows\.|steps|epochs|seed|batch_|max_length|rank|_tokens$|_rows$", key)
]


@pytest.mark.parametrize("key", sorted({*BOUNDED, "arms.NAME.links", "link.bottleneck", "link.init_batches"}))
def test_every_count_has_a_bound(read: Read, key: str) -> None:
    key = key.replace("NAME", "chain3")
    value = f"[{HUGE}]" if key.endswith("seeds") else f"{{search: [{HUGE}, 1]}}" if key.endswith("search") else HUGE
    if key in ("arms.chain3.search.seeds", "training.learning_rate.seeds"):
        value = f"[{HUGE}]"
    said = fault(read, PLAIN, f"{key}={value}")
    assert key in said
    assert len(said) < 600


def test_what_is_many_only_together_is_counted_before_it_is_made(read: Read, tmp_path: Path) -> None:
    began = time.process_time()
    assert "less than or equal to" in fault(read, PLAIN, "arms.base.links=20000000")
    grid = f"{{search: {list(range(1, 101))}}}"
    said = fault(read, PLAIN, f"arms.lora.rank={grid}", f"arms.lora.init_batches={grid}")
    assert "arms.lora: its search has 10000 combinations; 1000 are the most" in said
    assert "make 12000 trainings; 10000 are the most" in fault(read, PLAIN, f"seeds={list(range(6000))}")
    (tmp_path / "grid.yaml").write_text(PLAIN)
    values = ",".join(map(str, range(1, 41)))
    with pytest.raises(RecipeError, match="the lists make 1600 points; 1000 are the most"):
        points_of(tmp_path / "grid.yaml", [f"link.rank={values}", f"training.batch_size={values}"], paired=False)
    grow = read(PLAIN, "training.protocol=grow", "training.steps=1000000")
    with pytest.raises(RecipeError, match=r"arms\.chain3: 3000000 optimizer steps; 1000000 are the most"):
        plan_arm(grow, "chain3", 0, 24)
    assert time.process_time() - began < 60  # of CPU, on any machine: nothing of it is made


def test_a_value_in_a_message_is_cut_at_80_characters(read: Read) -> None:
    for override in ("training.batch_size=" + "x" * 5000, "x" * 5000 + "=1", "comparison.full=" + "x" * 5000):
        assert "x" * 70 in fault(read, PLAIN, override)
        assert "x" * 81 not in fault(read, PLAIN, override)
    assert len(quoted("x" * 5000)) == len(quoted(["x"] * 5000)) == 80


def test_a_message_has_few_lines_and_characters_however_many_faults_there_are(read: Read) -> None:
    said = fault(read, PLAIN + "".join(f"key{n}: {n}\n" for n in range(500)))
    assert 2 < len(said.splitlines()) <= MOST_LINES
    assert len(said) <= LONGEST
    assert "plain.yaml:16: key0: unknown key" in said
    assert re.search(r"\nand \d+ more$", said)
    assert str(ColaError("a" * 3000 + " end")).endswith(" end")


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("lora: {links: 1}", "1e3: {links: 1}", '13: arms.1e3: 1e3 is a number to YAML; .* in quotes: "1e3"'),
        ("lora: {links: 1}", "007: {links: 1}", '13: arms.007: 007 is a number to YAML; .* in quotes: "007"'),
        ("lora: {links: 1}", "true: {links: 1}", '13: arms.true: true is true or false to YAML; .* in quotes: "true"'),
        ("lora: {links: 1}", "null: {links: 1}", '13: arms.null: null is nothing to YAML; .* in quotes: "null"'),
        ("name: plain", "name: 1e3", '1: name: .* got 1e3, which is a number to YAML; .* in quotes: "1e3"'),
        ("name: plain", "name: null", '1: name: .* got null, which is nothing to YAML; .* in quotes: "null"'),
        ('answer: "{answer}"', "answer: 12", '8: data.answer: .* got 12, which is a number .* in quotes: "12"'),
        ("seeds:", "comparison: {full: 1e3}\nseeds:", '15: comparison.full: .* got 1e3, .* in quotes: "1e3"'),
        ("{links: 3}", "{rank: true}", "14: arms.chain3.rank: a whole number is expected, not true"),
        ("{links: 3}", "{links: yes}", "14: arms.chain3.links: .*got 'yes'"),
        ("epochs: 2", "steps: 0x10", "10: training.steps: .*got '0x10'"),
    ],
)  # fmt: skip
def test_a_name_that_yaml_takes_for_something_else_is_to_be_written_in_quotes(
    read: Read, old: str, new: str, says: str
) -> None:
    said = fault(read, swap(old, new))
    assert re.search(says, said), said
    assert "\n" not in said


@pytest.mark.parametrize("name", ["on", "off", "yes", "no", "2024-01-01", "1_000", "0x10", "'1e3'", "'null'"])
def test_other_yaml_versions_types_and_what_is_in_quotes_are_names(read: Read, name: str) -> None:
    assert read(swap("lora:", f"{name}:")).arms.keys() == {name.strip("'"), "chain3"}


def test_the_remedy_for_an_override_has_the_shells_quotes_too(read: Read) -> None:
    assert """write it in quotes: model.revision='"0123456"'""" in fault(read, PLAIN, "model.revision=0123456")
    assert read(PLAIN, 'model.revision="0123456"').model.revision == "0123456"


@pytest.mark.parametrize("text", ["1.0", "010", "1e3", "+5", "null", "~"])
def test_an_answers_text_that_would_be_another_text_is_to_be_written_in_quotes(read: Read, text: str) -> None:
    old = 'task: answer\n  prompt: "{question}?"\n  answer: "{answer}"'
    for choices in (f"[{text}, b]", f"{{a: {text}, b: b}}", f"{{{text}: a, b: b}}"):
        assert f'in quotes: "{text}"' in fault(read, swap(old, CHOICE + choices))
    assert read(swap(old, f"{CHOICE}['{text}', b]")).data.choices == [text, "b"]


@pytest.mark.parametrize("template", ["{a:b}", "{a!r}", "{}", "{a", "a}"])
def test_a_template_that_names_no_field_is_refused_as_the_recipe_is_read(read: Read, template: str) -> None:
    said = fault(read, swap("{question}?", template))
    assert said.partition("plain.yaml:")[2].startswith(f"7: data.prompt: {template!r}: ")


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("output=~no-such-user/x", "there is no user of that name"),
        ("data.files=" + "x" * 300, "File name too long"),
        ('store="a\\0b"', "a path has no NUL"),
        ("model.name_or_path=" + "x/" * 3000, "1000 characters at most"),
        ('name="\\ud800"', "half a character"),
        ("seeds.²=1", "² is no place in a list of 2"),
        ("arms.lora={search: x, rank: {search: [1, 2]}}", "arms.lora.search: input should be a valid dictionary"),
        ("seeds=[" + "9" * 5000 + "]", "seeds.0: "),
        ("name=!!int x", "could not determine a constructor"),
        ("a." * 100 + "b=1", "more than 50 keys"),
        ("name=\x07", "not valid YAML: the character U+0007"),
    ],
)
def test_what_the_fuzzer_has_found_is_told_in_one_line(read: Read, override: str, says: str) -> None:
    said = fault(read, PLAIN, override)
    assert says in said.splitlines()[-1]
