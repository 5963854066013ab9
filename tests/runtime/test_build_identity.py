"""The identity of a build, whatever builds it: a checkout, a worktree, an archive, a source distribution.

The commits are made by the real git; its answer is the reference for the reader that needs no git.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from repository_paths import REPOSITORY
from visionedge import __version__
from visionedge.runtime import build_identity
from visionedge.runtime.build_identity import BuildIdentity, find_build_identity, read_build_identity
from visionedge.runtime.git_commit import Commit, GitError, read_head_commit

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed here")

TIME_S = 1_796_018_700
TIME = "2026-11-30T06:05:00Z"
COPIED = ("HEAD", "packed-refs", "refs", "objects")
"""What .dockerignore lets into the build of an image."""


def git(folder: Path, *words: str) -> str:
    """What git answers, in a folder, with fixed names and times and no configuration of this machine."""
    environ = {
        "PATH": os.environ["PATH"],
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_NOSYSTEM": "1",
        **{
            f"GIT_{who}_{what}": "me@example" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")
        },
        "GIT_AUTHOR_DATE": "1000000000 +0000",
        "GIT_COMMITTER_DATE": f"{TIME_S} +0100",
    }
    done = subprocess.run(
        ["git", "-C", str(folder), *words], env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def commit(folder: Path, text: str) -> str:
    """Commit a changed file; the hash."""
    (folder / "file.txt").write_text(text)
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", f"{text}\n\n{'The same long explanation. ' * 20}")
    return git(folder, "rev-parse", "HEAD")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository with three commits."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    git(folder, "init", "--quiet", "--initial-branch=main")
    for text in ("one", "two", "three"):
        commit(folder, text)
    return folder


def identity_of(folder: Path, **environ: str) -> str:
    """The one string of the sources in a folder."""
    return str(find_build_identity(folder, environ))


def expected(folder: Path) -> str:
    """The one string for the commit that git names."""
    return f"{__version__}+g{git(folder, 'rev-parse', 'HEAD')[:12]} ({TIME})"


def test_a_checkout_has_the_commit_and_its_time(checkout: Path) -> None:
    assert identity_of(checkout) == expected(checkout)


def test_a_packed_repository_is_read_without_git(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = expected(checkout)
    git(checkout, "pack-refs", "--all")
    git(checkout, "gc", "--quiet", "--aggressive", "--prune=now")
    assert not list((checkout / ".git/objects").glob("[0-9a-f][0-9a-f]"))
    monkeypatch.setenv("PATH", os.devnull)
    assert identity_of(checkout) == wanted


def test_every_commit_of_a_pack_is_read_deltas_included(checkout: Path) -> None:
    """Git stores similar commits as differences."""
    commits = [commit(checkout, f"number {number}") for number in range(20)]
    git(checkout, "repack", "-q", "-a", "-d", "-f", "--depth=20", "--window=20")
    pack = next((checkout / ".git/objects/pack").glob("*.idx"))
    table = git(checkout, "verify-pack", "--verbose", str(pack)).splitlines()
    assert [line for line in table if " commit " in line and len(line.split()) == 7], "no delta to test"
    for each in commits:
        (checkout / ".git" / "HEAD").write_text(f"{each}\n")
        assert read_head_commit(checkout / ".git") == Commit(each, TIME_S)


def test_a_repository_of_sha256_is_read(tmp_path: Path) -> None:
    git(tmp_path, "init", "--quiet", "--object-format=sha256")
    commit(tmp_path, "one")
    assert identity_of(tmp_path) == expected(tmp_path)
    git(tmp_path, "gc", "--quiet")
    assert identity_of(tmp_path) == expected(tmp_path)


def test_a_shallow_clone_a_worktree_and_a_detached_head_have_their_commit(
    checkout: Path, tmp_path: Path
) -> None:
    wanted = expected(checkout)
    git(tmp_path, "clone", "--quiet", "--depth=1", checkout.as_uri(), "shallow")
    assert identity_of(tmp_path / "shallow") == wanted
    git(checkout, "worktree", "add", "--quiet", "-b", "side", str(tmp_path / "tree"))
    assert (tmp_path / "tree" / ".git").is_file()
    assert identity_of(tmp_path / "tree") == wanted
    git(checkout, "pack-refs", "--all")
    assert identity_of(tmp_path / "tree") == wanted
    git(checkout, "checkout", "--quiet", "--detach", "HEAD~1")
    assert identity_of(checkout) == expected(checkout) != wanted


def test_the_files_that_reach_the_build_of_an_image_are_enough(checkout: Path, tmp_path: Path) -> None:
    """The Dockerfiles copy them, with pyproject.toml beside them."""
    wanted = expected(checkout)
    git(checkout, "gc", "--quiet")
    folder = tmp_path / "src" / ".git"
    folder.mkdir(parents=True)
    (folder / "pyproject.toml").touch()
    for name in COPIED:
        source = checkout / ".git" / name
        if source.is_dir():
            shutil.copytree(source, folder / name)
        else:
            shutil.copy(source, folder)
    assert identity_of(tmp_path / "src") == wanted
    rules = (REPOSITORY / ".dockerignore").read_text().splitlines()
    assert {rule for rule in rules if ".git/" in rule} == {f"!.git/{name}" for name in COPIED}


def test_a_build_without_git_takes_the_revision_that_it_is_given(tmp_path: Path) -> None:
    given = {"VISIONEDGE_REVISION": f"{'1a2b3c4d5e6f':0<40}-dirty", "SOURCE_DATE_EPOCH": str(TIME_S)}
    assert identity_of(tmp_path, **given) == f"{__version__}+g1a2b3c4d5e6f.dirty ({TIME})"
    assert identity_of(tmp_path, VISIONEDGE_REVISION="1a2b3c4") == f"{__version__}+g1a2b3c4"


def test_the_time_of_the_commit_counts_more_than_that_of_the_build(checkout: Path) -> None:
    revision = git(checkout, "rev-parse", "HEAD")
    assert identity_of(checkout, VISIONEDGE_REVISION=revision, SOURCE_DATE_EPOCH="0") == expected(checkout)


@pytest.mark.parametrize("given", ["", "unknown", "v1.2", "main", "xyz" * 9])
def test_without_any_of_these_the_identity_is_unknown_with_the_reason(tmp_path: Path, given: str) -> None:
    found = find_build_identity(tmp_path, {"VISIONEDGE_REVISION": given, "SOURCE_DATE_EPOCH": "now"})
    assert str(found) == f"{__version__}+unknown"
    assert found.reason == "no .git, and VISIONEDGE_REVISION is not set"


@pytest.mark.parametrize("damage", ["HEAD", "refs/heads/main"])
@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"ref: refs/heads/none\n", b"0123\n", None])
def test_damaged_files_of_git_break_nothing(checkout: Path, damage: str, content: bytes | None) -> None:
    path = checkout / ".git" / damage
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    found = find_build_identity(checkout, {})
    assert found.revision == "unknown"
    assert found.reason
    with pytest.raises(GitError):
        read_head_commit(checkout / ".git")


@pytest.mark.parametrize("kept_bytes", [0, 1, 20, 200, 1100])
def test_a_damaged_pack_leaves_the_time_unknown(checkout: Path, kept_bytes: int) -> None:
    git(checkout, "gc", "--quiet", "--prune=now")
    revision = git(checkout, "rev-parse", "HEAD")
    for path in (checkout / ".git/objects/pack").glob("pack-*.*"):
        path.chmod(0o600)
        path.write_bytes(path.read_bytes()[:kept_bytes])
    assert read_head_commit(checkout / ".git").hash == revision
    assert read_head_commit(checkout / ".git").time_s in (None, TIME_S)


def test_a_worktree_whose_repository_is_gone_is_unknown(checkout: Path, tmp_path: Path) -> None:
    git(checkout, "worktree", "add", "--quiet", str(tmp_path / "tree"))
    shutil.rmtree(checkout)
    assert find_build_identity(tmp_path / "tree", {}).revision == "unknown"
    (tmp_path / "tree" / ".git").write_text("nothing")
    assert find_build_identity(tmp_path / "tree", {}).reason == ".git is a file that names no folder"


def test_the_running_code_has_an_identity_that_begins_with_its_version() -> None:
    assert str(read_build_identity()).startswith(f"{__version__}+")


def test_the_file_in_the_package_is_what_an_installed_wheel_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_identity, "_PACKAGE", tmp_path)
    read = read_build_identity.__wrapped__
    assert read().reason == "_build.json is missing in the package"
    kept = BuildIdentity("0.9.0", "1a2b3c4d5e6f", TIME)
    (tmp_path / "_build.json").write_text(kept.to_json())
    assert read() == kept
    for damaged in ("", "[]", "{}", '{"version": 1}'):
        (tmp_path / "_build.json").write_text(damaged)
        assert read().reason.startswith("_build.json cannot be read")


def test_the_command_prints_the_string_or_single_values(capsys: pytest.CaptureFixture[str]) -> None:
    """`make image` and scripts take the label from it."""
    found = read_build_identity()
    assert build_identity.main([]) == build_identity.main(["revision", "builtAt"]) == 0
    assert capsys.readouterr().out.splitlines() == [str(found), found.revision, found.built_at]
    assert build_identity.main(["colour"]) == 2


# --- what is built ------------------------------------------------------------------------------------------


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A repository with the sources of the package, without its large files."""
    folder = tmp_path / "sources"
    folder.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "THIRD-PARTY.md", ".gitattributes"):
        shutil.copy(REPOSITORY / name, folder)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(REPOSITORY / "module/visionedge", folder / "module/visionedge", ignore=ignored)
    (folder / "tools").mkdir()
    shutil.copy(REPOSITORY / "tools/build_hook.py", folder / "tools")
    for name in ("models", "media"):
        (folder / name).mkdir()
        (folder / name / "kept.txt").touch()
    (folder / ".gitignore").write_text("__pycache__/\n")
    git(folder, "init", "--quiet", "--initial-branch=main")
    commit(folder, "one")
    return folder


def build(sources: Path, target: str, out: Path) -> Path:
    """Build a wheel or an sdist with hatchling; the file."""
    if importlib.util.find_spec("hatchling") is None:
        pytest.skip("hatchling is not installed here; `make test` installs it")
    command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(out)]
    built = subprocess.run(
        command, cwd=sources, capture_output=True, text=True, check=False, env={"PATH": os.environ["PATH"]}
    )
    assert built.returncode == 0, built.stderr
    (file,) = out.iterdir()
    return file


def identity_in(wheel: Path) -> dict[str, str]:
    """The identity that a wheel carries."""
    with zipfile.ZipFile(wheel) as archive:
        document: dict[str, str] = json.loads(archive.read("visionedge/_build.json"))
    return document


def test_a_wheel_and_a_source_distribution_carry_the_commit_and_two_builds_are_equal(
    sources: Path, tmp_path: Path
) -> None:
    wanted = find_build_identity(sources, {}).document()
    assert wanted["revision"] == git(sources, "rev-parse", "HEAD")[:12]
    wheels = [build(sources, "wheel", tmp_path / name) for name in ("first", "second")]
    assert wheels[0].read_bytes() == wheels[1].read_bytes()
    assert identity_in(wheels[0]) == wanted
    with tarfile.open(build(sources, "sdist", tmp_path / "sdist")) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    assert not (unpacked / ".git").exists()
    assert identity_in(build(unpacked, "wheel", tmp_path / "third")) == wanted
    assert git(sources, "status", "--porcelain") == ""


def test_a_build_with_changed_tracked_files_is_marked(sources: Path, tmp_path: Path) -> None:
    (sources / "untracked.txt").write_text("x")
    assert "dirty" not in identity_in(build(sources, "wheel", tmp_path / "first"))["revision"]
    (sources / "file.txt").write_text("changed")
    revision = identity_in(build(sources, "wheel", tmp_path / "second"))["revision"]
    assert revision == f"{git(sources, 'rev-parse', 'HEAD')[:12]}-dirty"
    (sources / ".git" / "index").unlink()  # as in the build of an image
    assert identity_in(build(sources, "wheel", tmp_path / "third"))["revision"] == revision[:12]


def test_an_archive_of_git_carries_the_commit(sources: Path, tmp_path: Path) -> None:
    wanted = identity_of(sources)
    git(sources, "archive", "--output", str(tmp_path / "a.tar"), "HEAD")
    with tarfile.open(tmp_path / "a.tar") as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    assert identity_of(tmp_path / "unpacked") == wanted
    (tmp_path / "unpacked" / ".git").mkdir()  # as the build of an image makes it
    assert identity_of(tmp_path / "unpacked") == wanted


def test_a_build_without_any_identity_works_and_says_so(sources: Path, tmp_path: Path) -> None:
    shutil.rmtree(sources / ".git")
    wheel = build(sources, "wheel", tmp_path / "out")
    assert identity_in(wheel)["reason"] == "no .git, and VISIONEDGE_REVISION is not set"
