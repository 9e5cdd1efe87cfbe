"""`fedbus model` as separate processes on a real repository: output, exit codes and one-line errors."""

import asyncio
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from support import eventually
from support.cli import CliResult, clean_environment, run_fedbus
from support.s3_server import run_seaweed
from support.terminal import open_terminal

from fedbus.app.cli.commands.model.repository import format_metrics
from fedbus.contracts.champion import Champion
from fedbus.contracts.model import Manifest
from fedbus.learning import weights
from fedbus.stores.models.open import ModelStore, open_model_store


class ModelCli:
    """Runs `fedbus model …` in a separate process."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.environment = clean_environment("AWS") | {"FEDBUS_HOME": str(home), "COLUMNS": "200"}
        self.environment["AWS_EC2_METADATA_DISABLED"] = "true"

    def __call__(self, *words: str) -> CliResult:
        return run_fedbus("model", *words, environment=self.environment)


@pytest.fixture
def fedbus(tmp_path: Path) -> ModelCli:
    return ModelCli(tmp_path / "home")


def arrays(version: int) -> weights.Arrays:
    return {
        "layer.weight": np.full((3, 4), version, dtype=np.float32),
        "layer.bias": np.zeros(3, dtype=np.float32),
    }


async def publish_version(store: ModelStore, directory: Path, version: int, parent: int | None) -> Manifest:
    path = directory / f"{version}.safetensors"
    artifact = weights.save(arrays(version), path)
    await store.put(path, artifact.sha256)
    return await store.publish(
        Manifest(
            **artifact.model_dump(),
            version=version,
            task="mnist",
            created=datetime.now(UTC),
            parent=parent,
            run=f"mnist-{version - 1}" if parent else None,
            rounds=2 if parent else 0,
            participants={"c1": 20, "c2": 30} if parent else {},
            metrics={"loss": 1 / version},
            code_version="f" * 40,
        )
    )


async def publish_three_versions(url: str, directory: Path) -> list[Manifest]:
    """Three versions; the parent of the third is the first."""
    store = open_model_store(url, "mnist")
    await store.prepare()
    return [await publish_version(store, directory, *of) for of in ((1, None), (2, 1), (3, 1))]


@pytest.fixture
async def published_versions(fedbus: ModelCli, tmp_path: Path) -> list[Manifest]:
    return await publish_three_versions(str(fedbus.home / "models"), tmp_path)


async def test_ls_lists_the_newest_first_and_marks_the_latest(
    fedbus: ModelCli, published_versions: list[Manifest]
) -> None:
    result = fedbus("ls", "--json")
    assert [(one["version"], one["latest"]) for one in result.facts] == [(3, True), (2, False), (1, False)]
    assert result.facts[0]["sha256"] == published_versions[2].sha256
    assert result.facts[0]["participants"] == {"c1": 20, "c2": 30}
    table = fedbus("ls").out.splitlines()
    assert table[1].split()[:2] == ["v3", "latest"]
    assert "2 (50)" in table[1]
    assert "the first model" in table[3]


async def test_a_narrow_terminal_omits_columns_and_cuts_none(
    fedbus: ModelCli, published_versions: list[Manifest]
) -> None:
    async with open_terminal("model", "ls", environment=fedbus.environment, columns=60) as shown:
        async with asyncio.timeout(60):
            assert await shown.process.wait() == 0
        await eventually(lambda: "a wider terminal" in " ".join(shown.text.split()))
    assert shown.lines[0].split() == ["version", "run", "metrics", "created"]
    assert "…" not in shown.text
    assert max(map(len, shown.lines)) <= 60  # a longer one the terminal would break within a word
    omitted = "signed, weights, size, lineage, rounds, sha256, parent, clients (samples), code"
    assert f"the terminal is too narrow for {omitted}" in " ".join(shown.text.split())


def test_of_many_metrics_loss_and_accuracy_are_the_headline() -> None:
    metrics = {"train_loss": 0.5, "eval_loss": 0.25, "loss": 0.25, "accuracy": 0.875}
    assert format_metrics(metrics) == "loss 0.25, accuracy 0.875"
    assert format_metrics({"rmse": 0.5}) == "rmse 0.5"
    assert format_metrics({"train_loss": 0.5}, "no client could") == "train_loss 0.5, evaluation failed"


@pytest.mark.parametrize("version", ["2", "v2"])
async def test_show_prints_the_manifest(
    fedbus: ModelCli, published_versions: list[Manifest], version: str
) -> None:
    assert Manifest.model_validate(fedbus("show", version, "--json").facts) == published_versions[1]
    assert published_versions[1].sha256 in fedbus("show", version).out
    assert "evaluation_failure" not in fedbus("show", version).out
    assert fedbus("show", "--json").facts["version"] == 3


async def test_lineage_is_a_tree(fedbus: ModelCli, published_versions: list[Manifest]) -> None:
    lines = fedbus("show", "--lineage").out.splitlines()
    assert lines[0] == "mnist"
    assert [line.index("v") for line in lines[1:]] == [4, 8, 8]
    assert [one["parent"] for one in fedbus("show", "--lineage", "--json").facts] == [None, 1, 1]


async def test_diff_prints_the_change_of_tensors_and_metrics(
    fedbus: ModelCli, published_versions: list[Manifest]
) -> None:
    facts = fedbus("diff", "1", "3", "--json").facts
    first, second = facts["tensors"]
    assert facts["architecture"] is None
    assert first["tensor"] == "layer.weight"
    assert first["old_norm"] == pytest.approx(12**0.5)
    assert first["moved"] == pytest.approx(2 * 12**0.5)
    assert first["relative"] == pytest.approx(2)
    assert second["moved"] == second["relative"] == 0
    assert facts["metrics"] == [{"metric": "loss", "old": 1.0, "new": pytest.approx(1 / 3)}]
    assert "200.00%" in fedbus("diff", "1", "3").out


async def test_ls_and_lineage_mark_served_and_rejected_versions(
    fedbus: ModelCli, published_versions: list[Manifest]
) -> None:
    store = open_model_store(str(fedbus.home / "models"), "mnist")
    await store.set_champion(Champion(version=1, term=1, since=datetime.now(UTC)))
    await store.set_champion(Champion(version=2, term=2, before=(1,), since=datetime.now(UTC)))
    standings = [one["standing"] for one in fedbus("ls", "--json").facts]
    assert standings == ["not served", "champion", "served before"]
    assert "v2  champion" in fedbus("show", "--lineage").out
    assert fedbus("show", "champion", "--json").facts["version"] == 2


async def test_verify_requires_signatures_with_trusted_keys(
    fedbus: ModelCli, published_versions: list[Manifest], tmp_path: Path
) -> None:
    assert fedbus("keygen", str(tmp_path / "key")).code == 0
    fedbus.environment["FEDBUS_TRUSTED_KEYS"] = str(tmp_path / "key.pub")
    result = fedbus("verify", "v1")
    assert result.code == 1
    assert "version 1 of mnist is not signed" in result.err


async def test_verify_checks_the_pointer_to_the_champion(
    fedbus: ModelCli, published_versions: list[Manifest]
) -> None:
    (fedbus.home / "models" / "mnist" / "champion").write_text("{")
    result = fedbus("verify")
    assert result.code == 1
    assert "it names no champion" in result.err


def test_init_without_new_lineage_explains_the_option(fedbus: ModelCli) -> None:
    result = fedbus("init")
    assert result.code == 2
    assert "use --new-lineage" in result.err


async def test_verify_finds_changed_files(fedbus: ModelCli, published_versions: list[Manifest]) -> None:
    assert fedbus("verify").code == 0
    home = fedbus.home / "models" / "mnist"
    (home / f"{published_versions[1].sha256}.safetensors").write_bytes(b"other bytes")
    (home / "versions" / "1.json").write_text("{")
    result = fedbus("verify", "--json")
    assert result.code == 1
    assert [bool(one["complaint"]) for one in result.facts] == [True, True, False]
    assert result.err.startswith("fedbus: v1: ")
    assert result.err.count("\n") == 1
    assert fedbus("verify", "v3").code == 0


async def test_export_copies_a_version_and_overwrites_nothing(
    fedbus: ModelCli, published_versions: list[Manifest], tmp_path: Path
) -> None:
    out = tmp_path / "out.safetensors"
    assert fedbus("export", "2", str(out)).code == 0
    np.testing.assert_array_equal(weights.load(out)["layer.weight"], arrays(2)["layer.weight"])
    again = fedbus("export", "3", str(out))
    assert again.code == 2
    assert "already exists" in again.err
    assert fedbus("export", "3", str(out), "--force").code == 0
    assert weights.load(out)["layer.weight"][0, 0] == 3


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("show", "9"), 5, "has no version 9; it has 1 to 3"),
        (("show", "newest"), 2, "'newest' is not a version"),
        (("show", "1", "--task", "cifar"), 6, "there is no model repository"),
        (("ls", "--store", "gopher://x"), 2, "unknown model store scheme 'gopher'"),
        (("ls", "--store", "/nowhere/at/all"), 5, "no model repository at /nowhere/at/all"),
        (("ls", "--store", "s3://bucket/models?endpoint=http://127.0.0.1:9"), 6, "check that it runs"),
        (("export", "1", "/nowhere/at/all"), 6, "cannot write /nowhere/at/all"),
        (("export", "1", "/tmp"), 2, "/tmp is a directory"),
    ],
)
async def test_an_error_is_one_line_and_an_exit_code(
    fedbus: ModelCli, published_versions: list[Manifest], words: tuple[str, ...], code: int, message: str
) -> None:
    result = fedbus(*words)
    assert result.code == code, result.err
    assert message in result.err
    assert result.err.count("\n") == 1
    assert result.out == ""


async def test_several_tasks_require_the_task_option(
    fedbus: ModelCli, published_versions: list[Manifest]
) -> None:
    await open_model_store(str(fedbus.home / "models"), "cifar").prepare()
    assert "Choose one with --task: cifar, mnist" in fedbus("ls").err
    assert fedbus("ls", "--task", "cifar", "--json").facts == []


async def test_the_embedded_s3_is_found_with_its_key(
    fedbus: ModelCli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def look() -> None:
        with run_seaweed(fedbus.home / "s3") as s3:
            monkeypatch.setenv("FEDBUS_S3_CREDENTIALS", str(s3.credentials))
            asyncio.run(publish_three_versions(s3.store_url, tmp_path))
            (fedbus.home / "store.url").write_text(s3.store_url)
            assert [one["version"] for one in fedbus("ls", "--json").facts] == [3, 2, 1]
            assert fedbus("verify").code == 0
            assert fedbus("diff", "1", "2", "--json").facts["tensors"][0]["moved"] > 0
            assert fedbus("export", "1", str(tmp_path / "out")).code == 0

    await asyncio.to_thread(look)
