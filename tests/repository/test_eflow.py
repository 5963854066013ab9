"""deploy/eflow: scripts, docs and `doctor --plan` use only cmdlets and parameters of Microsoft's reference.

No PowerShell is run here: the scripts were never run. `cmdlets.json` has the names, sources and dates.
"""

import json
import re
import shlex
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from powershell_commands import (
    PowerShellSyntaxError,
    read_commands,
    read_functions,
    read_splatted_keys,
)
from repository_paths import REPOSITORY
from visionedge.__main__ import main
from visionedge.ops.doctor.eflow_plan import make_eflow_plan
from visionedge.ops.support_dates import EFLOW_ARM64_VERSION, EFLOW_VERSION, TABLE_DATE

FOLDER = REPOSITORY / "deploy" / "eflow"
SCRIPTS = sorted(FOLDER.glob("*.ps1"))
PLANS = sorted((REPOSITORY / "tests" / "golden" / "plan").glob("*.txt"))
PAGES = [REPOSITORY / "docs" / "eflow.md", REPOSITORY / "docs" / "gpu.md"]
TABLE: dict[str, Any] = json.loads((FOLDER / "cmdlets.json").read_text(encoding="utf-8"))
PROGRAMS = ("wsl ", "usbipd ", "powershell ", "visionedge ", "az ", "docker ", "make ", "$env:", ".\\")
"""Lines that begin with a program, not with a cmdlet."""


def known() -> dict[str, set[str]]:
    """Parameters by cmdlet, all in lower case."""
    common = {name.lower() for name in TABLE["common"]}
    found = {}
    for name, entry in TABLE["cmdlets"].items():
        more = [each for names in entry.get("alsoFrom", {}).values() for each in names]
        found[name.lower()] = {each.lower() for each in [*entry["parameters"], *more]} | common
    return found


def find_unknown(text: str) -> list[str]:
    """Cmdlets and parameters of a PowerShell text that the table and the text itself do not know."""
    table = known()
    own = {name.lower(): {p.lower() for p in names} for name, names in read_functions(text).items()}
    problems = []
    for command in read_commands(text):
        allowed = own.get(command.name.lower(), table.get(command.name.lower()))
        if allowed is None:
            problems.append(command.name)
            continue
        given = [*command.parameters]
        for variable in command.splats:
            keys = read_splatted_keys(text, variable)
            assert keys, f"@{variable} has no keys"
            given += sorted(keys)
        problems += [f"{command.name} -{name}" for name in given if name.lower() not in allowed]
    return problems


def plan_lines(text: str) -> list[str]:
    """The lines to type of a plan: PowerShell, not the JSON of a deployment."""
    lines = [line[5:] for line in text.splitlines() if line.startswith("     ")]
    return [line for line in lines if not line.startswith(("{", '"'))]


def page_lines(path: Path) -> list[str]:
    """The lines of a page's PowerShell examples."""
    lines = [line[4:].strip() for line in path.read_text(encoding="utf-8").splitlines() if line[:4] == "    "]
    return [line for line in lines if re.match(r"\(?[A-Z][a-z]+-[A-Z]", line)]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_uses_only_cmdlets_and_parameters_of_the_reference(path: Path) -> None:
    """Those that it splats too."""
    text = path.read_text(encoding="utf-8")
    assert find_unknown(text) == []
    assert len(read_commands(text)) > 20


@pytest.mark.parametrize("path", [*PLANS, *PAGES], ids=lambda path: path.name)
def test_a_printed_line_uses_only_cmdlets_and_parameters_of_the_reference(path: Path) -> None:
    """In the plans of doctor and in the docs; each line is complete by itself."""
    lines = plan_lines(path.read_text(encoding="utf-8")) if path.suffix == ".txt" else page_lines(path)
    assert lines or path.name.startswith("home")
    for line in lines:
        assert find_unknown(line) == [], line
        assert line.startswith(PROGRAMS) or read_commands(line), line
        # A reader pastes it: only ASCII (no typographic quotes), nothing that PowerShell expands.
        assert line.isascii(), line
        assert not set(line) & set("$`"), line


def test_the_table_has_no_cmdlet_that_is_not_used() -> None:
    texts = [path.read_text(encoding="utf-8") for path in SCRIPTS]
    texts += ["\n".join(plan_lines(path.read_text(encoding="utf-8"))) for path in PLANS]
    texts += ["\n".join(page_lines(path)) for path in PAGES]
    used = {command.name.lower() for text in texts for command in read_commands(text)}
    assert {name for name in TABLE["cmdlets"] if name.lower() not in used} == set()


def test_every_cmdlet_of_the_table_has_a_source_with_a_date() -> None:
    assert date.fromisoformat(TABLE["read"]) <= TABLE_DATE
    for source in TABLE["sources"].values():
        assert re.fullmatch("[0-9a-f]{40}", source["commit"])
        assert date.fromisoformat(source["date"]) <= TABLE_DATE
        assert "/" in source["repository"]
        assert source["path"]
    for entry in TABLE["cmdlets"].values():
        assert {entry["source"], *entry.get("alsoFrom", {})} <= set(TABLE["sources"])
        assert entry["source"] in ("eflow", "autodeploy") or entry["file"].endswith(".md")


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        ("Deploy-Eflow -cpuCount 4 -memoryInMb 8192", []),
        ("Deploy-Eflow -cpus 4", ["Deploy-Eflow -cpus"]),
        ("Deploy-EflowVm -cpuCount 4", ["Deploy-EflowVm"]),
        ("$null = Set-EflowVM -headless -vmDataSize 5", ["Set-EflowVM -vmDataSize"]),
        ("Provision-EflowVm -devConnString (Read-Host -Promt 'x')", ["Read-Host -Promt"]),
        ("Get-EflowVm -all | Select-Object -ExpandProperty X", ["Get-EflowVm -all"]),
        ("Get-EflowVm | Select-Object -Expand X", ["Select-Object -Expand"]),
        ("if (Verify-EflowVm -x) { Start-EflowVm -now }", ["Verify-EflowVm -x", "Start-EflowVm -now"]),
        ("if ($a -eq 1 -and $b -notin 2, 3) { exit 1 }", []),
        ("$x = @{ cpuCount = 1; cores = 2 }\nDeploy-Eflow @x", ["Deploy-Eflow -cores"]),
        ("$x = @{}\n$x.ip4Adress = 1\nDeploy-Eflow @x", ["Deploy-Eflow -ip4Adress"]),
        ("Deploy-Eflow -cpuCount 1 `\n  -wrong 2", ["Deploy-Eflow -wrong"]),
        ("# Deploy-Nothing -x\n<# Deploy-Nothing #> Start-EflowVm", []),
        (
            "Invoke-EflowVmCommand -command 'sudo Deploy-Nothing -x' -ignoreErrors",
            ["Invoke-EflowVmCommand -ignoreErrors"],
        ),
        ("function Get-Own {\n    param([int] $A)\n}\nGet-Own -A 1 -B 2", ["Get-Own -B"]),
        ("@(Get-EflowVmEndpoint)[0].Name; Get-EflowVm -force", ["Get-EflowVm -force"]),
        ("try { Start-EflowVm -a } catch { Get-EflowVm -b }", ["Start-EflowVm -a", "Get-EflowVm -b"]),
        ("return (Start-EflowVm -a)", ["Start-EflowVm -a"]),
    ],
)
def test_a_wrong_cmdlet_or_parameter_is_found(text: str, problems: list[str]) -> None:
    """The test of the tests above."""
    assert find_unknown(text) == problems


@pytest.mark.parametrize(
    "text", ['Deploy-Eflow -gpuName "NVIDIA A2', "Get-EflowVm)", "if ($a) {", "(a]", "'it''s"]
)
def test_an_unclosed_quote_or_bracket_is_found(text: str) -> None:
    with pytest.raises(PowerShellSyntaxError):
        read_commands(text)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_has_help_what_if_and_exit_codes(path: Path) -> None:
    """Each parameter is described, and each step asks ShouldProcess."""
    text = path.read_text(encoding="utf-8")
    assert text.isascii() or set(re.findall(r"[^\x00-\x7f]", text)) == {"…"}
    assert "[CmdletBinding(SupportsShouldProcess)]" in text
    assert "$PSCmdlet.ShouldProcess(" in text
    block = text[text.index("\nparam(") : text.index("\n)\n")]
    names = set(re.findall(r"\] \$(\w+)(?=[ ,\n]|$)", block))
    assert len(names) > 4
    assert set(re.findall(r"^\.PARAMETER (\w+)$", text, re.MULTILINE)) == names
    documented = set(
        re.findall(r"\b(\d+) [a-zA-Z]", text[text.index("Exit codes:") : text.index(".PARAMETER")])
    )
    returned = set(re.findall(r"\bexit (\d+)\b", text)) | ({"3010"} if "$RestartExitCode" in text else set())
    assert returned == documented
    assert ".EXAMPLE" in text


def script_parameters(name: str) -> set[str]:
    """The parameters of a script, with the common ones."""
    text = (FOLDER / name).read_text(encoding="utf-8")
    block = text[text.index("\nparam(") : text.index("\n)\n")]
    return {each.lower() for each in re.findall(r"\] \$(\w+)(?=[ ,\n]|$)", block)} | {"whatif"}


def test_a_printed_call_of_a_script_has_its_parameters() -> None:
    """In docs/eflow.md and in the examples of the scripts themselves."""
    texts = [path.read_text(encoding="utf-8") for path in (PAGES[0], *SCRIPTS)]
    calls = [
        call
        for text in texts
        for call in re.findall(r"^ +.*\\((?:install|verify)\.ps1 .*)$", text, re.MULTILINE)
    ]
    assert len(calls) >= 6
    for call in calls:
        name, *words = call.split()
        given = {word[1:].lower() for word in words if re.fullmatch(r"-[A-Za-z]\w+", word)}
        assert given <= script_parameters(name), call


def test_every_visionedge_line_of_the_page_runs_as_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In their order, in an empty folder; the only thing to set is the key."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DPS_KEY", "c2VjcmV0LWtleS1vZi10aGUtZW5yb2xtZW50")
    lines = [line.strip() for line in PAGES[0].read_text(encoding="utf-8").splitlines() if line[:4] == "    "]
    commands = [shlex.split(line)[1:] for line in lines if line.startswith("visionedge ")]
    assert len(commands) >= 6
    for arguments in commands:
        assert main(arguments) == 0, arguments
    assert {path.name for path in tmp_path.iterdir()} == {"eflow.json", "site-7.json", "deployment.json"}
    assert "no problems" in capsys.readouterr().out


def test_the_page_is_short_and_says_what_was_not_run() -> None:
    text = PAGES[0].read_text(encoding="utf-8")
    assert len(text.split()) <= 1_500
    assert "**Every other line was not run**" in text
    for version in (EFLOW_VERSION, EFLOW_ARM64_VERSION, "2026-11-10", "2028-11-14"):
        assert version in text


def test_a_secret_is_neither_printed_nor_given_to_another_process() -> None:
    """It is read as a SecureString, and goes into a splatted hashtable only."""
    text = (FOLDER / "install.ps1").read_text(encoding="utf-8")
    assert "[securestring] $Secret" in text
    uses = [line.strip() for line in text.splitlines() if "$script:hidden" in line]
    assert len(uses) == 5
    assert [re.findall(r"\$identity\.(\w+) = ", use) for use in uses[-2:]] == [["symmKey"], ["devConnString"]]
    for command in re.findall(r"(?:Write-\w+|Start-Process|Invoke-EflowVmCommand)[^\n]*", text):
        assert not re.search(r"\$(script:hidden|Secret|identity|text)\b", command), command
    assert "Write-Warning -Message (Hide-Secret -Text $_.Exception.Message)" in text


def test_a_plan_and_the_scripts_use_the_same_names() -> None:
    """A reader who changes from typed lines to the script finds the same words."""
    plan = make_eflow_plan("20348", "server", "NVIDIA A2").to_text()
    script = (FOLDER / "install.ps1").read_text(encoding="utf-8")
    for name in ("vswitchName", "ip4GatewayAddress", "gpuPassthroughType", "vmDataSize", "dnsServers"):
        assert f"-{name} " in plan
        assert name.lower() in script.lower()
