#Requires -Version 5.1
#Requires -RunAsAdministrator
<#
.SYNOPSIS
    Checks EFLOW and the module after an update of Windows, of a driver or of EFLOW; changes nothing.

.DESCRIPTION
    One line for each check: ok, or what is wrong and what to do. With -Start a stopped VM is started, and with
    -PullImage an image is pulled before its deployment, so that the site's link is used at a quiet hour.

    Not run on Windows yet. A test compares every cmdlet and parameter with Microsoft's reference
    (cmdlets.json).

    Exit codes: 0 all is well, 1 a check failed, 3 EFLOW or its VM is missing.

.PARAMETER CpuCount
    Processors that the VM must have; 0: not checked.

.PARAMETER MemoryInMB
    Memory that the VM must have; 0: not checked.

.PARAMETER GpuPassthroughType
    The GPU that the VM must have: none, DirectDeviceAssignment or ParaVirtualization.

.PARAMETER ModuleId
    The module to ask for its own report; empty: none.

.PARAMETER Start
    Start the VM if it does not run.

.PARAMETER PullImage
    An image to pull into the VM. A private registry needs credentials in the VM's Docker before.

.EXAMPLE
    .\verify.ps1 -CpuCount 4 -MemoryInMB 8192 -GpuPassthroughType DirectDeviceAssignment

.EXAMPLE
    .\verify.ps1 -Start -PullImage registry.example.com/visionedge:0.2.0-gpu -WhatIf
#>
[CmdletBinding(SupportsShouldProcess)]
param(
    [ValidateRange(0, 240)] [int] $CpuCount = 0,
    [ValidateRange(0, 1048576)] [int] $MemoryInMB = 0,
    [ValidateSet('none', 'DirectDeviceAssignment', 'ParaVirtualization')] [string] $GpuPassthroughType = 'none',
    [ValidatePattern('^[A-Za-z0-9_-]*$')] [string] $ModuleId = 'vision',
    [switch] $Start,
    [ValidatePattern('^[A-Za-z0-9._/:@-]*$')] [string] $PullImage
)

Set-StrictMode -Version 3.0
$ErrorActionPreference = 'Stop'
$script:failed = 0

function Write-Check {
    <# One line; a failed check counts. #>
    param([string] $Name, [bool] $Passed, [string] $Found, [string] $Remedy)
    if ($Passed) { Write-Output -InputObject "ok      ${Name}: $Found"; return }
    $script:failed++
    Write-Output -InputObject "FAILED  ${Name}: $Found; $Remedy"
}

function Invoke-Vm {
    <# The output of a command in the VM as one text; an error gives its text. #>
    param([string] $Command)
    try { return (Invoke-EflowVmCommand -command $Command -ignoreError) -join "`n" }
    catch { return $_.Exception.Message }
}

try {
    if (-not (Get-Module -Name AzureEFLOW -ListAvailable)) {
        Write-Warning -Message 'EFLOW is not installed: run install.ps1'
        exit 3
    }
    Import-Module -Name AzureEFLOW
    if (-not (Verify-EflowVm)) {
        Write-Warning -Message 'there is no VM: run install.ps1'
        exit 3
    }
    if ($Start -and $PSCmdlet.ShouldProcess('the VM', 'start')) { $null = Start-EflowVm }

    $vm = Get-EflowVm
    $state = "$($vm.VmPowerState)"
    Write-Check -Name 'VM' -Passed ($state -match 'running') -Found "$state" -Remedy 'Start-EflowVm; never restart it from inside'
    $has = $vm.SystemStatistics
    $keep = 'Set-EflowVM with all of processors, memory and GPU: it resets what is left out'
    if ($CpuCount) {
        Write-Check -Name 'processors' -Passed ([int] $has.CpuCount -eq $CpuCount) -Found "$($has.CpuCount)" -Remedy $keep
    }
    if ($MemoryInMB) {
        Write-Check -Name 'memory' -Passed ([int] $has.TotalMemMb -ge 0.9 * $MemoryInMB) -Found "$($has.TotalMemMb) MB" -Remedy $keep
    }
    $free = [int] $has.AvailableStorageMb
    Write-Check -Name 'disk' -Passed ($free -ge 2048) -Found "$free MB free" -Remedy 'remove old images: docker image prune --all'

    if ($GpuPassthroughType -eq 'DirectDeviceAssignment') {
        $driver = Invoke-Vm -Command 'sudo nvidia-smi --query-gpu=name,driver_version --format=csv,noheader'
        Write-Check -Name 'GPU' -Passed ($driver -match '\d{3}\.\d+') -Found $driver -Remedy $keep
    }
    if ($GpuPassthroughType -eq 'ParaVirtualization') {
        $node = Invoke-Vm -Command 'ls /dev/dxg'
        Write-Check -Name 'GPU' -Passed ($node -match '^/dev/dxg') -Found $node -Remedy $keep
    }
    $addresses = Invoke-Vm -Command 'resolvectl query mcr.microsoft.com'
    Write-Check -Name 'DNS' -Passed ($addresses -match '\d+\.\d+\.\d+\.\d+') -Found 'mcr.microsoft.com' -Remedy 'Set-EflowVmDNSServers'
    $edge = Invoke-Vm -Command 'sudo iotedge check --output json'
    Write-Check -Name 'IoT Edge' -Passed ($edge -notmatch '"result":\s*"(error|fatal)"') -Found 'iotedge check' -Remedy 'see Invoke-EflowVmCommand "sudo iotedge check"'
    if ($ModuleId) {
        $modules = Invoke-Vm -Command 'sudo iotedge list'
        Write-Check -Name 'module' -Passed ($modules -match "(?m)^$ModuleId\s+running") -Found $ModuleId -Remedy 'see iotedge logs'
        $report = Invoke-Vm -Command "sudo docker exec $ModuleId visionedge doctor"
        $device = ($report -split "`n" | Select-String -Pattern '^device:' | Select-Object -First 1) -replace '^device: '
        Write-Check -Name 'doctor' -Passed ($device -and $report -notmatch 'first broken link') -Found $device -Remedy 'its report has the remedy'
    }
    if ($PullImage -and $PSCmdlet.ShouldProcess($PullImage, 'pull into the VM')) {
        $pulled = Invoke-Vm -Command "sudo docker pull --quiet $PullImage"
        Write-Check -Name 'image' -Passed ($pulled -match [regex]::Escape($PullImage)) -Found $pulled -Remedy 'check the registry and its credentials'
    }
    if ($script:failed) { exit 1 }
    exit 0
}
catch {
    Write-Warning -Message $_.Exception.Message
    exit 1
}
