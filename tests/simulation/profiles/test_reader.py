"""Reading profiles: files, built-in names, parameters, and the texts of errors."""

from pathlib import Path

import pytest

from fedbus.simulation.profiles.errors import ProfileError, ProfileMissing
from fedbus.simulation.profiles.reader import (
    MAX_PROFILE_BYTES,
    builtin_profiles,
    load_profile,
    parse_profile,
    profile_text,
)

BAD_PROFILES = [
    ("", "p.yaml: a profile is a mapping with the key `groups`, not an empty file"),
    ("[1]", "p.yaml: a profile is a mapping with the key `groups`, not a list"),
    ("groups: {}", "p.yaml:1: groups: {} must not be empty"),
    ("groups: [", "p.yaml:1: the file is not valid YAML: while parsing a flow node"),
    ("groups:\n  a: {}\n  a: {}", "p.yaml:3: groups.a: the key is repeated"),
    ("description: x", "p.yaml:1: groups is missing"),
    ("gruops: {a: {}}", "p.yaml:1: gruops is not a known key. Did you mean `groups`?"),
    (
        "groups:\n  a:\n    bandwith: 3",
        "p.yaml:3: groups.a.bandwith is not a known key. Did you mean `bandwidth`?",
    ),
    (
        "groups: {a: {x: 3}}",
        "p.yaml:1: groups.a.x is not a known key. Known keys: share, count, clients, training",
    ),
    (
        "groups: {a: {delay: {second: 3}}}",
        "groups.a.delay.second is not a known key. Did you mean `seconds`?",
    ),
    ("groups: {a: {delay: -3}}", "groups.a.delay: -3 must be ≥ 0"),
    ("groups: {a: {delay: soon}}", "groups.a.delay: 'soon' must be a number of seconds, or a mapping"),
    ("groups: {a: {delay: true}}", "groups.a.delay: true must be a number of seconds, or a mapping"),
    ("groups: {a: {delay: .nan}}", "groups.a.delay: nan must be a finite number"),
    ("groups: {a: {delay: .inf}}", "groups.a.delay: inf must be a finite number"),
    ("groups: {a: {delay: {seconds: 3, probability: 1.5}}}", "groups.a.delay.probability: 1.5 must be ≤ 1"),
    (
        "groups: {a: {delay: {seconds: 3, probability: x}}}",
        "groups.a.delay.probability: 'x' must be a number",
    ),
    (
        "groups:\n  a:\n    delay: {distribution: nomal, mean-s: 3}",
        "p.yaml:3: groups.a.delay: distribution 'nomal' is not known. Did you mean 'normal'? Valid: constant, uniform",
    ),
    (
        "groups: {a: {latency: {distribution: normal, mean-s: 3}}}",
        "groups.a.latency.std-s is missing",
    ),
    (
        "groups: {a: {latency: {distribution: uniform, min-s: 3, max-s: 1}}}",
        "groups.a.latency: `max-s` 1 must be ≥ `min-s` 3",
    ),
    ("groups: {a: {loss: 1}}", "groups.a.loss: 1 must be < 1"),
    (
        "groups: {a: {loss: {probability: 0.1, then: dropp}}}",
        "'dropp' must be one of: 'retransmit' or 'drop'",
    ),
    ("groups: {a: {bandwidth: 0}}", "groups.a.bandwidth: 0 must be ≥ 0.001"),
    ("groups: {a: {bandwidth: {down-mbit: 3}}}", "Did you mean `down-mbit-s`?"),
    ("groups: {a: {disconnections: {every-s: 3}}}", "groups.a.disconnections.duration is missing"),
    ("groups: {a: {disconnections: {every-s: 0, duration: 1}}}", "every-s: 0 must be ≥ 0.1"),
    ("groups: {a: {availability: {}}}", "set exactly one of `share`, `hours` and `intervals-s`"),
    (
        "groups: {a: {availability: {share: 0.5, hours: [22:00-07:00]}}}",
        "`share` and `hours` exclude each other",
    ),
    ("groups: {a: {availability: {share: 0}}}", "groups.a.availability.share: 0 must be > 0"),
    ("groups: {a: {availability: {hours: 22:00-07:00}}}", "hours: '22:00-07:00' must be a list"),
    ("groups: {a: {availability: {hours: [22-7]}}}", "hours[0]: write the hours as 22:00-07:00"),
    ("groups: {a: {availability: {intervals-s: [[5, 3]]}}}", "the interval [5, 3] must end after its start"),
    (
        "groups: {a: {availability: {intervals-s: [[0, 9], [4, 12]]}}}",
        "the interval [4, 12] must end after its start and begin after the previous one",
    ),
    (
        "groups: {a: {availability: {intervals-s: [[0, 9]], repeat-s: 5}}}",
        "`repeat-s` 5 must be ≥ the end of the last interval 9",
    ),
    (
        "groups: {a: {availability: {share: 0.5, repeat-s: 5}}}",
        "`repeat-s` has no effect without `intervals-s`",
    ),
    ("groups: {a: {training: {slowdown: 0}}}", "groups.a.training.slowdown: 0 must be > 0"),
    (
        "groups: {a: {training: {seconds: 1, seconds-per-sample: 2}}}",
        "groups.a.training: `seconds` and `seconds-per-sample` exclude each other",
    ),
    ("groups: {a: {count: 1.5}}", "groups.a.count: 1.5 must be an integer"),
    ("groups: {a: {share: 2}}", "groups.a.share: 2 must be ≤ 1"),
    ("groups: {a: {share: 0.5, count: 2}}", "groups.a: `share` and `count` exclude each other"),
    ("groups: {a: {share: 0.7}, b: {share: 0.7}}", "the shares of the groups add up to 1.4 (limit 1)"),
    ("groups: {a: {}, b: {}}", "the groups a and b have no `share`, `count` or `clients`"),
    ("groups: {a: {clients: c1}}", "groups.a.clients: 'c1' must be a list"),
    ("groups: {a: 3}", "groups.a: 3 must be a mapping of keys and values"),
    ("groups: {'': {}}", "'' is not a valid name"),
    ('day-starts-at: "8"\ngroups: {a: {}}', 'day-starts-at: write the time as "08:00"'),
    ("seed: x\ngroups: {a: {}}", "p.yaml:1: seed: 'x' must be an integer"),
    (
        "groups:\n  a:\n    delay: $d",
        "p.yaml:3: groups.a.delay: there is no parameter `d`. Add it to `parameters`",
    ),
    ("parameters: 3\ngroups: {a: {}}", "parameters: 3 must be a mapping"),
    ("parameters: {d: soon}\ngroups: {a: {delay: $d}}", "groups.a.delay: 'soon' must be a number of seconds"),
    (
        "groups: {a: {delay: -1, latency: -1, loss: 2, bandwidth: -1, count: -1, share: -1}}",
        "; and 1 more",
    ),
]


@pytest.mark.parametrize(("text", "problem"), BAD_PROFILES)
def test_invalid_profile_names_place_and_remedy(text: str, problem: str) -> None:
    with pytest.raises(ProfileError) as failure:
        parse_profile(text, "p.yaml")
    assert problem in str(failure.value)
    assert "\n" not in str(failure.value)


def test_repeated_aliases_cannot_exhaust_the_memory() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    with pytest.raises(ProfileError, match="too many values"):
        parse_profile("\n".join(lines), "p.yaml")


def test_recursive_alias_is_an_error() -> None:
    with pytest.raises(ProfileError):
        parse_profile("groups: &g\n  a: *g", "p.yaml")


def test_merge_keys_share_conditions() -> None:
    profile = parse_profile(
        "groups:\n  a: &a {share: 0.5, delay: 3}\n  b:\n    <<: *a\n    delay: 4\n", "p.yaml"
    )
    assert profile.groups["b"].share == 0.5


def test_short_forms() -> None:
    profile = parse_profile("groups: {a: {delay: 3, bandwidth: 8, loss: 0.1}}", "p.yaml")
    group = profile.groups["a"]
    assert group.delay is not None
    assert group.loss is not None
    assert (group.delay.mean_s, group.bandwidth.up_mbit_s, group.loss.probability) == (3.0, 8.0, 0.1)


def test_unquoted_time_of_the_day() -> None:
    assert parse_profile("day-starts-at: 22:30\ngroups: {a: {}}", "p.yaml").day_starts_at == 22.5 * 3600
    assert parse_profile("day-starts-at: 08:30\ngroups: {a: {}}", "p.yaml").day_starts_at == 8.5 * 3600


def test_parameters_of_a_source() -> None:
    profile = load_profile("delay-study:delay-s=4,probability=0.6")
    delay = profile.groups["delayed"].delay
    assert delay is not None
    assert (delay.mean_s, delay.probability) == (4.0, 0.6)
    assert load_profile("delay-study").model_dump_json() != profile.model_dump_json()


def test_file_with_parameters(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("parameters: {d: 1}\ngroups: {a: {delay: $d}}")
    delay = load_profile(f"{file}:d=7").groups["a"].delay
    assert delay is not None
    assert delay.mean_s == 7.0
    assert load_profile(file) == load_profile(str(file))


def test_unknown_parameter() -> None:
    with pytest.raises(
        ProfileError, match=r"there is no parameter `delay`. Its parameters are: delay-s, probability"
    ):
        load_profile("delay-study:delay=4")
    with pytest.raises(ProfileError, match=r"'4' is not a parameter. Write delay-study:key=value"):
        load_profile("delay-study:4")


def test_missing_profile_suggests_a_name() -> None:
    with pytest.raises(ProfileMissing, match=r"Did you mean 'mobile'\?"):
        load_profile("moble")
    with pytest.raises(ProfileMissing, match=r"there is no profile ./x.yaml"):
        load_profile("./x.yaml")


def test_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "large.yaml").write_bytes(b"#" * (MAX_PROFILE_BYTES + 1))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "folder.yaml").mkdir()
    for name, text in (("large", "too large"), ("binary", "not UTF-8"), ("folder", "cannot be read")):
        with pytest.raises(ProfileError, match=text):
            load_profile(tmp_path / f"{name}.yaml")


@pytest.mark.parametrize("name", builtin_profiles())
def test_built_in_text_can_be_copied_to_a_file(name: str, tmp_path: Path) -> None:
    file = tmp_path / "copy.yaml"
    file.write_text(profile_text(name))
    assert load_profile(file) == load_profile(name)
