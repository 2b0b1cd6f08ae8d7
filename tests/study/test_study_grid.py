"""Grids: which runs there are, what is left out, what is refused, and what names a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from kronafuse import Bottleneck, KronA, LoKr, LoRA
from kronafuse.nn.positions import PAIRS, SINKS, SOURCES
from kronafuse.study.families import adapter_spec, describe
from kronafuse.study.grid import make_grid, run_id
from kronafuse.study.request import SMOKE_ADAPTERS, Request, make_request, read_study

STUDIES = Path(__file__).parents[2] / "bench" / "studies"


def bottleneck(**axes: Any) -> dict[str, Any]:
    return {"family": "bottleneck", "width": 4, **axes}


def pairs_of(configs: Any) -> list[tuple[str, str]]:
    return list(dict.fromkeys((each["source"], each["sink"]) for each in configs))


def test_all_pairs_and_seeds() -> None:
    grid = make_grid([bottleneck(pairs="all")], [0, 1, 2])
    assert len(grid.configs) == 60
    assert pairs_of(grid.configs) == list(PAIRS)
    assert grid.illegal == ()


def test_cross_product_leaves_out_illegal_pairs() -> None:
    grid = make_grid([bottleneck(source=list(SOURCES), sink=list(SINKS))], [0])
    assert set(pairs_of(grid.configs)) == set(PAIRS)
    assert len(grid.illegal) == 50
    assert "ff_in -> attn1_in" in grid.illegal


def test_every_axis_is_crossed() -> None:
    table = bottleneck(activation=["relu", "silu"], scale=[0.5, 1, 2], width=[4, 8])
    grid = make_grid([table], [3, 5])
    assert len(grid.configs) == 2 * 3 * 2 * 2
    assert {each["scale"] for each in grid.configs} == {0.5, 1.0, 2.0}
    assert {each["seed"] for each in grid.configs} == {3, 5}


def test_families_become_their_specs() -> None:
    tables = [
        {"family": "bottleneck", "budget": 2, "activation": "silu"},
        {"family": "krona", "factors": "4x8"},
        {"family": "lokr", "factor": 4, "rank": 2, "alpha": 1},
        {"family": "lora", "rank": 2, "scale": 0.5},
    ]
    specs = [adapter_spec(each) for each in make_grid(tables, [0]).configs]
    assert specs == [
        Bottleneck(width=None, budget=2.0, activation="silu"),
        KronA((4, 8)),
        LoKr(4, 2, 1.0),
        LoRA(2, scale=0.5),
    ]


def test_the_same_run_in_two_tables_is_one_run() -> None:
    first, second = bottleneck(scale=[1, 2]), bottleneck(scale=[2.0, 4.0])
    assert [each["scale"] for each in make_grid([first, second], [0]).configs] == [1.0, 2.0, 4.0]


def test_an_id_names_everything_that_decides_the_result() -> None:
    config = make_grid([bottleneck()], [0]).configs[0]
    name = run_id("digits", {"steps": 3}, config)
    assert name == run_id("digits", {"steps": 3}, dict(reversed(config.items())))
    others = [
        run_id("other", {"steps": 3}, config),
        run_id("digits", {"steps": 4}, config),
        run_id("digits", {"steps": 3}, {**config, "seed": 1}),
        run_id("digits", {"steps": 3}, {**config, "activation": "silu"}),
    ]
    assert len({name, *others}) == 5
    assert len(name) == 12


TABLES = [
    {"family": "bottleneck", "pairs": ["ff_in -> ff_in"], "budget": 12.0, "scale": [1, 2]},
    {"family": "bottleneck", "form": "compacter", "terms": 2, "width": 8},
    {"family": "bottleneck", "pairs": "ff_in -> block_out", "form": "krona", "factors": "4x8"},
    {"family": "krona", "factors": "4x8"},
    {"family": "lokr", "factor": 4},
    {"family": "lora", "rank": 2},
]


def test_an_id_does_not_change_between_versions() -> None:
    """Finished studies would be redone."""
    names = [run_id("digits", {"steps": 3}, config) for config in make_grid(TABLES, [0]).configs]
    assert names == [
        "cf566e35b87e",
        "274f1dd5825b",
        "5ad855e4c829",
        "6e34f5ed6048",
        "06566e9892c0",
        "c97d2922eeba",
        "09744fd19957",
    ]


def test_a_new_axis_at_its_default_leaves_the_ids_as_they_are() -> None:
    """The run of a version that did not have `terms` yet is not redone, and another value is another run."""
    (config,) = make_grid([bottleneck()], [0]).configs
    older = {name: value for name, value in config.items() if name != "terms"}
    assert run_id("digits", {}, older) == run_id("digits", {}, config)
    assert run_id("digits", {}, {**config, "terms": 2}) != run_id("digits", {}, config)


def test_description() -> None:
    (config,) = make_grid([bottleneck(scale=0.5)], [1]).configs
    assert describe(config) == "bottleneck attn2_out -> ff_in relu scale=0.5 width=4 init=zero_up seed=1"


@pytest.mark.parametrize(
    ("tables", "seeds", "message"),
    [
        ([], [0], "the grid needs an adapter family"),
        ([{"family": "dora"}], [0], "family must be one of bottleneck, krona, lokr, lora; got 'dora'"),
        ([{"width": 4}], [0], "family must be one of bottleneck"),
        ([bottleneck(alpha=4.0)], [0], "family 'bottleneck' has no axis alpha; its axes are: pairs, source"),
        ([{"family": "lora", "width": 4}], [0], "family 'lora' has no axis width; its axes are: rank, alpha"),
        ([bottleneck(budget=2)], [0], "give width or budget, not both"),
        ([bottleneck(pairs="all", sink="ff_in")], [0], "give pairs, or source and sink, not both"),
        ([bottleneck(pairs=[])], [0], "pairs must name at least one pair"),
        ([bottleneck(pairs="ff_in")], [0], "a pair is written \"source -> sink\"; got 'ff_in'"),
        (
            [bottleneck(pairs=["ff_in -> ff_in", "ff_in -> attn1_in"])],
            [0],
            "sweep: sink 'attn1_in' comes before source 'ff_in' in the block; allowed sinks: ff_in, block_out",
        ),
        (
            [bottleneck(source="ff_in", sink="attn1_in")],
            [0],
            "sweep: sink 'attn1_in' comes before source 'ff_in' in the block; allowed sinks: ff_in, block_out",
        ),
        (
            [bottleneck(source=["ff_in", "ff_out"], sink=["attn1_in", "res_in"])],
            [0],
            "no legal pair of source ff_in, ff_out and sink attn1_in, res_in; the legal pairs are: attn1_in ->",
        ),
        ([bottleneck(source=["middle", "ff_in"])], [0], "source must be one of attn1_in.*; got middle"),
        ([bottleneck(sink="attn1_out")], [0], "sink must be one of .*; got attn1_out"),
        ([bottleneck(activation="tanh")], [0], "activation must be one of .*; got 'tanh'"),
        ([bottleneck(scale=[1, 1.0])], [0], "scale must have different values, at least one"),
        ([bottleneck(width=[])], [0], "width must have different values, at least one"),
        ([bottleneck(width=0)], [0], "width must be a positive integer; got 0"),
        ([bottleneck(width=257)], [0], "width H must be 1 to 256"),
        ([bottleneck()], [], "seeds must be different integers, at least one"),
        ([bottleneck()], [0, 0], "seeds must be different integers"),
        ([bottleneck()], [-1], "seeds must be at least 0; got -1"),
        (
            [bottleneck()],
            [0, 2**63],
            r"seeds must be below 2\*\*63 = 9223372036854775808; got 9223372036854775808",
        ),
        ([bottleneck(terms=[2, 4])], [0], "form dense has no axis terms: terms is for compacter"),
        ([bottleneck(rank=2)], [0], "form dense has no axis rank: rank is for compacter"),
        (
            [bottleneck(pairs="ff_in -> block_out", form=["krona", "krona_res"], factors="4x8")],
            [0],
            "form krona, krona_res has no axis width: width is for dense, compacter",
        ),
        ([bottleneck(form="conv", terms=2)], [0], "form must be one of dense, compacter, krona, krona_res"),
    ],
)
def test_rejects(tables: list[dict[str, Any]], seeds: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_grid(tables, seeds)


def test_rejects_values_of_another_type() -> None:
    with pytest.raises(TypeError, match=r"width must be an integer; got 4.5"):
        make_grid([bottleneck(width=4.5)], [0])


def request(study: dict[str, Any] | None = None, **options: Any) -> Request:
    axes = {name: options.pop(name) for name in list(options) if name not in OPTIONS}
    values = {"job": None, "seeds": None, "families": None, "settings": [], "smoke": False, **options}
    return make_request(study or {}, axes=axes, **values)


OPTIONS = ("job", "seeds", "families", "settings", "smoke")


def test_options_take_the_place_of_the_study_files_keys(tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    path.write_text(
        'job = "digits"\nseeds = [0, 1]\n[settings]\nsteps = 5\nwarmup = 2\n'
        '[[adapters]]\nfamily = "bottleneck"\npairs = "all"\nwidth = 4\n'
        '[[adapters]]\nfamily = "lora"\nrank = [2, 4]\n'
    )
    study = read_study(path)
    whole = request(study)
    assert len(whole.grid.configs) == (20 + 2) * 2
    assert whole.settings == {"steps": 5, "warmup": 2}
    changed = request(
        study, seeds="7", source="ff_in,res_in", sink="block_out,res_out", budget="12", rank="8", scale="0.5",
        settings=["steps=9", "decay=constant", "learning_rate=1e-3"],
    )  # fmt: skip
    assert pairs_of(each for each in changed.grid.configs if each["family"] == "bottleneck") == [
        ("ff_in", "block_out"),
        ("res_in", "res_out"),
    ]
    assert {each["scale"] for each in changed.grid.configs} == {0.5}
    assert {each.get("budget") for each in changed.grid.configs} == {12.0, None}
    assert {each.get("rank") for each in changed.grid.configs} == {8, None}
    assert changed.settings == {"steps": 9, "warmup": 2, "decay": "constant", "learning_rate": 1e-3}
    assert {each["family"] for each in request(study, families="lora").grid.configs} == {"lora"}
    assert {each["family"] for each in request(families="krona,lora", factors="4x8,8x4").grid.configs} == {
        "krona",
        "lora",
    }


def test_smoke_has_one_seed_and_its_own_grid_where_none_is_given() -> None:
    assert len(request(smoke=True).grid.configs) == len(SMOKE_ADAPTERS) + 1
    assert {each["seed"] for each in request({"seeds": [4, 5]}, smoke=True).grid.configs} == {4}
    assert len(request(smoke=True, pairs="all").grid.configs) == 20


def test_a_setting_is_a_toml_value_or_text() -> None:
    texts = {
        "a": ("true", True), "b": ("1_000", 1000), "c": ("5e-3", 5e-3), "d": ("[1, 2]", [1, 2]),
        "e": ('"7"', "7"), "f": ("cosine", "cosine"), "g": ("1\nh = 2", "1\nh = 2"), "i": ("a=b", "a=b"),
    }  # fmt: skip
    found = request(settings=[f"{name}={text}" for name, (text, _) in texts.items()])
    assert found.settings == found.options == {name: value for name, (_, value) in texts.items()}
    assert request({"settings": {"steps": 2}}, settings=["warmup=1"]).options == {"warmup": 1}


def test_a_form_given_as_an_option_brings_its_axes() -> None:
    configs = request(form="compacter", terms="2,4", width="8").grid.configs
    assert {(each["form"], each["terms"]) for each in configs} == {("compacter", 2), ("compacter", 4)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"families": "lora", "width": "4"}, r"no family of the grid \(lora\) has the axis width"),
        ({"families": "lora,dora"}, "family must be one of .*; got 'dora'"),
        ({"scale": "1,big"}, "scale must be numbers separated by commas; got '1,big'"),
        ({"width": "4.5"}, "width must be integers separated by commas; got '4.5'"),
        ({"seeds": "0,x"}, "seeds must be integers separated by commas; got '0,x'"),
        ({"settings": ["steps"]}, "a setting is written KEY=VALUE; got 'steps'"),
        ({"pairs": "ff_in->attn1_in"}, "comes before source"),
        ({"width": "4", "budget": "2"}, "give width or budget, not both; a budget chooses the width"),
        ({"pairs": "all", "source": "ff_in"}, "give pairs, or source and sink, not both"),
        ({"pairs": "all", "sink": "ff_in"}, "give pairs, or source and sink, not both"),
        ({"terms": "2"}, r"no family of the grid \(bottleneck\) has the axis terms"),
    ],
)
def test_rejects_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        request(**options)


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("seed = 1", ValueError, "unknown keys seed; a study has: job, seeds, settings, adapters"),
        ("seeds = 1", TypeError, "seeds must be a list of integers; got 1"),
        ("adapters = [1]", TypeError, r"adapters must be tables \[\[adapters\]\]"),
        ("job =", ValueError, "is not valid TOML"),
    ],
)
def test_rejects_study_files(tmp_path: Path, text: str, kind: type[Exception], message: str) -> None:
    path = tmp_path / "study.toml"
    path.write_text(text)
    with pytest.raises(kind, match=message):
        read_study(path)


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.toml")), ids=lambda path: path.stem)
def test_shipped_studies_are_grids_of_the_shipped_job(path: Path) -> None:
    from kronafuse.study.job import find_job

    found = request(read_study(path))
    assert len(found.grid.configs) >= 48
    job = find_job(found.job)
    assert set(job.complete(found.settings)) >= set(found.settings)


def test_forms_of_bottlenecks_are_axes() -> None:
    compacter = {"family": "bottleneck", "form": "compacter", "terms": [2, 4], "rank": 2, "width": 8}
    krona = {
        "family": "bottleneck", "pairs": "ff_in -> block_out", "form": ["krona", "krona_res"], "factors": "4x8",
    }  # fmt: skip
    configs = make_grid([compacter, krona], [0]).configs
    assert [(each["form"], each["terms"], each["width"]) for each in configs] == [
        ("compacter", 2, 8), ("compacter", 4, 8), ("krona", 4, None), ("krona_res", 4, None),
    ]  # fmt: skip
    assert [adapter_spec(each).factors for each in configs] == [None, None, (4, 8), (4, 8)]
    assert "krona_res factors=4x8" in describe(configs[-1])


def test_axes_that_a_form_does_not_have_are_at_their_default() -> None:
    """Dense has no terms: one run for it, and two for compacter, in one table."""
    table = {"family": "bottleneck", "width": 8, "form": ["dense", "compacter"], "terms": [2, 4]}
    configs = make_grid([table], [0]).configs
    assert [(each["form"], each["terms"]) for each in configs] == [
        ("dense", 4), ("compacter", 2), ("compacter", 4),
    ]  # fmt: skip
    krona = {
        "family": "bottleneck", "pairs": "ff_in -> block_out", "form": ["dense", "krona"], "factors": "4x8",
        "activation": ["relu", "silu"], "budget": [2.0, 4.0],
    }  # fmt: skip
    configs = make_grid([krona], [0]).configs
    assert len(configs) == 4 + 1
    assert [each["factors"] for each in configs].count(None) == 4
    (alone,) = (each for each in configs if each["form"] == "krona")
    assert (alone["factors"], alone["width"], alone["budget"]) == ("4x8", None, None)
    assert alone["activation"] == "relu"
    assert [describe(each) for each in make_grid([table], [0]).configs] == [
        "bottleneck attn2_out -> ff_in relu scale=1 width=8 init=zero_up seed=0",
        "bottleneck attn2_out -> ff_in relu compacter terms=2 scale=1 width=8 init=zero_up seed=0",
        "bottleneck attn2_out -> ff_in relu compacter terms=4 scale=1 width=8 init=zero_up seed=0",
    ]
    assert "relu" not in describe(alone)


def test_smoke_takes_one_seed_unless_told() -> None:
    assert {each["seed"] for each in make_request({}, smoke=True, job=None, seeds=None, families=None, axes={},
            settings=[]).grid.configs} == {0}  # fmt: skip
    told = make_request({}, smoke=True, job=None, seeds="5,6", families="lora", axes={}, settings=[])
    assert {each["seed"] for each in told.grid.configs} == {5, 6}
