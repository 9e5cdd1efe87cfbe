"""The examples and tables of docs/profiles.md are right."""

import re
from pathlib import Path

from fedbus.simulation.profiles.reader import builtin_profiles, load_profile, parse_profile
from fedbus.simulation.profiles.schema import Group

GUIDE = (Path(__file__).parents[3] / "docs" / "profiles.md").read_text()


def test_example_profile_is_valid() -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", GUIDE, re.DOTALL)
    profile = parse_profile(text, "docs/profiles.md")
    assert set(profile.groups) == {"phone", "server-room"}


def test_example_program_runs() -> None:
    (program,) = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
    exec(program, {})


def test_table_of_conditions_is_complete() -> None:
    keys = {str(field.alias) for field in Group.model_fields.values()} - {"share", "count", "clients"}
    table = GUIDE.partition("| key | meaning |")[2].partition("\n\n")[0]
    assert keys == set(re.findall(r"^\| `([a-z]+)` \|", table, re.MULTILINE))


def test_table_of_built_in_profiles_is_complete() -> None:
    rows = dict(
        re.findall(r"^\| `([a-z-]+)` \| (.*?) \|", GUIDE.partition("## Built-in profiles")[2], re.MULTILINE)
    )
    assert sorted(rows) == builtin_profiles()
    for name, text in rows.items():
        values = dict(setting.split("=") for setting in re.findall(r"`(.*?)`", text))
        assert values == {key: str(value) for key, value in load_profile(name).parameters.items()}
