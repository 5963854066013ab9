#Requires -Version 5.1
#Requires -RunAsAdministrator
<#
.SYNOPSIS
    Installs EFLOW, deploys its VM and gives it an identity, without questions.

.DESCRIPTION
    Each step is left out if its result exists, so the script can be started again, after a restart too.
    Steps: Hyper-V; a virtual switch with NAT (Windows Server) or on a network adapter; the MSI; the VM with
    processors, memory, disk, address, GPU; DNS; the identity; a check that the VM has what was asked for.

    A secret (connection string or symmetric key) comes from -Secret, from the file -SecretFile or from the
    environment variable -SecretVariable. It is not printed and stands on no command line.

    Not run on Windows yet. A test compares every cmdlet and parameter with Microsoft's reference
    (cmdlets.json).

    Exit codes: 0 done, 1 a step failed, 2 wrong arguments, 3 this Windows cannot do it,
    3010 restart Windows and start the script again.

.PARAMETER MsiPath
    The MSI of EFLOW. Needed, or MsiUrl, if EFLOW is not installed.

.PARAMETER MsiUrl
    An https address of the MSI.

.PARAMETER MsiSha256
    The SHA-256 of the MSI. Without it the signature of Microsoft is checked.

.PARAMETER AcceptEula
    You accept Microsoft's licence of EFLOW. Needed to deploy the VM.

.PARAMETER CpuCount
    Processors of the VM.

.PARAMETER MemoryInMB
    Memory of the VM in MB, an even number.

.PARAMETER VmDataSize
    Data disk of the VM in GB; it cannot grow later.

.PARAMETER VswitchName
    The virtual switch. Without it: the Default Switch of Windows 10 and 11. Needed on Windows Server.

.PARAMETER VswitchType
    Internal (Windows Server, with NAT) or External (bridged to NetAdapterName).

.PARAMETER NetAdapterName
    The network adapter of an external switch that is to be made.

.PARAMETER Ip4Address
    The static address of the VM. Without it: DHCP.

.PARAMETER Ip4GatewayAddress
    Its gateway; with an internal switch the address of Windows on it.

.PARAMETER Ip4PrefixLength
    The prefix length of the network.

.PARAMETER DnsServers
    DNS servers of the VM. Needed with a static address.

.PARAMETER GpuPassthroughType
    none, DirectDeviceAssignment (T4, A2) or ParaVirtualization (not on Windows Server).

.PARAMETER GpuName
    The name of the GPU in Windows.

.PARAMETER ProvisioningType
    none, ManualConnectionString, ManualX509, DpsTPM, DpsX509 or DpsSymmetricKey.

.PARAMETER ScopeId
    The scope of the Device Provisioning Service (Dps…).

.PARAMETER RegistrationId
    The registration in the Device Provisioning Service (DpsSymmetricKey, optional for DpsTPM).

.PARAMETER IotHubHostname
    The host name of the IoT hub (ManualX509).

.PARAMETER DeviceId
    The device in the IoT hub (ManualX509).

.PARAMETER IdentityCertPath
    The file of the identity certificate (…X509).

.PARAMETER IdentityPrivKeyPath
    The file of its private key (…X509).

.PARAMETER GlobalEndpoint
    The endpoint of the Device Provisioning Service, if not the public one.

.PARAMETER Secret
    The connection string (ManualConnectionString) or the symmetric key (DpsSymmetricKey).

.PARAMETER SecretFile
    A file with the secret, one line.

.PARAMETER SecretVariable
    The name of an environment variable with the secret.

.PARAMETER Reprovision
    Give the VM its identity again, although edgeAgent runs.

.EXAMPLE
    .\install.ps1 -MsiPath .\AzureIoTEdge.msi -AcceptEula -WhatIf

.EXAMPLE
    .\install.ps1 -MsiPath .\AzureIoTEdge.msi -AcceptEula -VswitchName EFLOW -VswitchType Internal -Ip4Address 172.20.0.2 -Ip4GatewayAddress 172.20.0.1 -DnsServers 10.0.0.53 -GpuPassthroughType DirectDeviceAssignment -GpuName 'NVIDIA A2' -ProvisioningType DpsTPM -ScopeId 0ne00000000
#>
[CmdletBinding(SupportsShouldProcess)]
param(
    [string] $MsiPath,
    [uri] $MsiUrl,
    [ValidatePattern('^[0-9A-Fa-f]{64}$')] [string] $MsiSha256,
    [switch] $AcceptEula,
    [ValidateRange(1, 240)] [int] $CpuCount = 4,
    [ValidateRange(1024, 1048576)] [int] $MemoryInMB = 8192,
    [ValidateRange(2, 2000)] [int] $VmDataSize = 20,
    [string] $VswitchName,
    [ValidateSet('Internal', 'External')] [string] $VswitchType,
    [string] $NetAdapterName,
    [ipaddress] $Ip4Address,
    [ipaddress] $Ip4GatewayAddress,
    [ValidateRange(8, 30)] [int] $Ip4PrefixLength = 24,
    [ipaddress[]] $DnsServers = @(),
    [ValidateSet('none', 'DirectDeviceAssignment', 'ParaVirtualization')] [string] $GpuPassthroughType = 'none',
    [string] $GpuName,
    [ValidateSet('none', 'ManualConnectionString', 'ManualX509', 'DpsTPM', 'DpsX509', 'DpsSymmetricKey')]
    [string] $ProvisioningType = 'none',
    [string] $ScopeId,
    [string] $RegistrationId,
    [string] $IotHubHostname,
    [string] $DeviceId,
    [string] $IdentityCertPath,
    [string] $IdentityPrivKeyPath,
    [uri] $GlobalEndpoint,
    [securestring] $Secret,
    [string] $SecretFile,
    [string] $SecretVariable,
    [switch] $Reprovision
)

Set-StrictMode -Version 3.0
$ErrorActionPreference = 'Stop'
$RestartExitCode = 3010
$script:hidden = ''

function Get-ArgumentFault {
    <# One sentence for each argument that is missing or does not fit. #>
    param([bool] $IsServer)
    if ($MemoryInMB % 2) { '-MemoryInMB: EFLOW wants an even number' }
    if ($MsiPath -and $MsiUrl) { 'give -MsiPath or -MsiUrl, not both' }
    if ($MsiUrl -and -not "$MsiUrl".StartsWith('https://')) { '-MsiUrl: must begin with https' }
    if ($MsiPath -and -not (Test-Path -LiteralPath $MsiPath -PathType Leaf)) { "-MsiPath: $MsiPath does not exist" }
    if ([bool] $VswitchName -ne [bool] $VswitchType) { 'give -VswitchName and -VswitchType together' }
    if ($IsServer -and -not $VswitchName) { '-VswitchName: Windows Server has no Default Switch' }
    if (-not $IsServer -and $VswitchType -eq 'Internal') { '-VswitchType: Internal is for Windows Server only' }
    if ([bool] $Ip4Address -ne [bool] $Ip4GatewayAddress) { 'give -Ip4Address and -Ip4GatewayAddress together' }
    if ($Ip4Address -and $Ip4Address -eq $Ip4GatewayAddress) { '-Ip4Address: is the address of the gateway' }
    if ($Ip4Address -and -not $VswitchName) { '-Ip4Address: the Default Switch has DHCP only' }
    if ($Ip4Address -and -not $DnsServers) { '-DnsServers: with a static address the VM has no DNS' }
    if (($GpuPassthroughType -ne 'none') -ne [bool] $GpuName) { 'give -GpuName with a -GpuPassthroughType' }
    $needed = @{
        none                   = @()
        ManualConnectionString = @('secret')
        ManualX509             = @('IotHubHostname', 'DeviceId', 'IdentityCertPath', 'IdentityPrivKeyPath')
        DpsTPM                 = @('ScopeId')
        DpsX509                = @('ScopeId', 'IdentityCertPath', 'IdentityPrivKeyPath')
        DpsSymmetricKey        = @('ScopeId', 'RegistrationId', 'secret')
    }[$ProvisioningType]
    $sources = @(@($Secret, $SecretFile, $SecretVariable) | Where-Object { $_ })
    foreach ($name in $needed) {
        if ($name -eq 'secret') {
            if ($sources.Count -ne 1) { "$ProvisioningType needs one of -Secret, -SecretFile, -SecretVariable" }
        }
        elseif (-not (Get-Variable -Name $name -ValueOnly)) { "${ProvisioningType} needs -$name" }
    }
    foreach ($path in @($IdentityCertPath, $IdentityPrivKeyPath, $SecretFile)) {
        if ($path -and -not (Test-Path -LiteralPath $path -PathType Leaf)) { "$path does not exist" }
    }
}

function Get-WindowsFault {
    <# Why EFLOW, or this passthrough, is not supported here; nothing if it is. #>
    param([Microsoft.Management.Infrastructure.CimInstance] $System, [bool] $IsServer)
    $build = [int] $System.BuildNumber
    if ($System.OperatingSystemSKU -in 98..101) { 'EFLOW needs Pro, Enterprise, IoT Enterprise or Server' }
    if ($IsServer -and $build -notin 17763, 20348) { 'EFLOW supports Windows Server 2019 and 2022 only' }
    if ($build -lt 17763) { 'EFLOW needs build 17763 or newer of Windows' }
    if ($IsServer -and $GpuPassthroughType -eq 'ParaVirtualization') { 'GPU-PV is not supported on Windows Server' }
    if (-not $IsServer -and $GpuPassthroughType -ne 'none' -and $build -lt 19044) {
        'GPU passthrough needs build 19044.1620 or newer of Windows'
    }
    $computer = Get-CimInstance -ClassName Win32_ComputerSystem
    if ($GpuPassthroughType -ne 'none' -and $computer.Model -match 'Virtual') {
        'this Windows is a virtual machine: EFLOW in it gets no GPU'
    }
}

function Read-Secret {
    <# The secret as a secure string. #>
    if ($Secret) { return $Secret }
    if ($SecretFile) { $text = (Get-Content -LiteralPath $SecretFile -TotalCount 1).Trim() }
    else { $text = [Environment]::GetEnvironmentVariable($SecretVariable) }
    if (-not $text) { throw 'the secret is empty' }
    return ConvertTo-SecureString -String $text -AsPlainText -Force
}

function Enable-HyperV {
    <# Returns whether Windows must restart. #>
    param([bool] $IsServer)
    if ($IsServer) {
        if ((Get-WindowsFeature -Name Hyper-V).Installed) { return $false }
        if (-not $PSCmdlet.ShouldProcess('Hyper-V', 'add the role')) { return $false }
        return (Install-WindowsFeature -Name Hyper-V -IncludeManagementTools).RestartNeeded -ne 'No'
    }
    $feature = Get-WindowsOptionalFeature -Online -FeatureName Microsoft-Hyper-V
    if ($feature.State -eq 'Enabled') { return $false }
    if (-not $PSCmdlet.ShouldProcess('Hyper-V', 'enable')) { return $false }
    $null = Enable-WindowsOptionalFeature -Online -FeatureName Microsoft-Hyper-V -All -NoRestart
    return $true
}

function Initialize-Switch {
    <# Makes the virtual switch; an internal one with the gateway's address and NAT. #>
    if (-not $VswitchName) { return }
    if (-not (Get-VMSwitch -Name $VswitchName -ErrorAction SilentlyContinue)) {
        if (-not $PSCmdlet.ShouldProcess($VswitchName, "make an $VswitchType switch")) { return }
        if ($VswitchType -eq 'External') {
            if (-not $NetAdapterName) { throw "-NetAdapterName: the switch $VswitchName does not exist" }
            $null = New-VMSwitch -Name $VswitchName -NetAdapterName $NetAdapterName
        }
        else { $null = New-VMSwitch -Name $VswitchName -SwitchType Internal }
    }
    if ($VswitchType -ne 'Internal' -or -not $Ip4GatewayAddress) { return }
    $alias = "vEthernet ($VswitchName)"
    if (-not (Get-NetIPAddress -IPAddress $Ip4GatewayAddress -ErrorAction SilentlyContinue)) {
        if ($PSCmdlet.ShouldProcess($alias, "give it the address $Ip4GatewayAddress")) {
            $null = New-NetIPAddress -IPAddress $Ip4GatewayAddress -PrefixLength $Ip4PrefixLength -InterfaceAlias $alias
        }
    }
    if (-not (Get-NetNat -Name $VswitchName -ErrorAction SilentlyContinue)) {
        $prefix = Get-NetworkPrefix
        if ($PSCmdlet.ShouldProcess($prefix, 'make a NAT')) {
            $null = New-NetNat -Name $VswitchName -InternalIPInterfaceAddressPrefix $prefix
        }
    }
}

function Get-NetworkPrefix {
    <# The network of the gateway's address: 172.20.0.1 with 24 is 172.20.0.0/24. #>
    $bytes = $Ip4GatewayAddress.GetAddressBytes()
    [array]::Reverse($bytes)
    $mask = [uint32]::MaxValue -shl (32 - $Ip4PrefixLength)
    $network = [BitConverter]::GetBytes([uint32] ([BitConverter]::ToUInt32($bytes, 0) -band $mask))
    [array]::Reverse($network)
    return "$([ipaddress]::new($network))/$Ip4PrefixLength"
}

function Install-Eflow {
    <# Installs the MSI if the module of EFLOW is not there. #>
    if (Get-Module -Name AzureEFLOW -ListAvailable) { return }
    if (-not $PSCmdlet.ShouldProcess('EFLOW', 'install')) { return }
    $file = $MsiPath
    if ($MsiUrl) {
        $file = Join-Path -Path $env:TEMP -ChildPath 'AzureIoTEdge.msi'
        Invoke-WebRequest -Uri $MsiUrl -OutFile $file -UseBasicParsing
    }
    if (-not $file) { throw 'EFLOW is not installed: give -MsiPath or -MsiUrl' }
    $file = (Resolve-Path -LiteralPath $file).ProviderPath
    if ($MsiSha256) {
        if ((Get-FileHash -LiteralPath $file -Algorithm SHA256).Hash -ne $MsiSha256) { throw "$file has another SHA-256" }
    }
    else {
        $signature = Get-AuthenticodeSignature -LiteralPath $file
        if ($signature.Status -ne 'Valid' -or $signature.SignerCertificate.Subject -notmatch 'O=Microsoft Corporation') {
            throw "$file is not signed by Microsoft"
        }
    }
    $installer = Start-Process -FilePath msiexec -ArgumentList '/i', "`"$file`"", '/qn', '/norestart' -Wait -PassThru
    if ($installer.ExitCode -notin 0, 3010) { throw "msiexec ended with $($installer.ExitCode)" }
}

function Install-Vm {
    <# Deploys the VM, or changes an existing one. Set-EflowVM resets each argument that is left out. #>
    $gpu = @{}
    if ($GpuPassthroughType -ne 'none') {
        $gpu = @{ gpuPassthroughType = $GpuPassthroughType; gpuName = $GpuName }
    }
    if (Verify-EflowVm) {
        if ((Get-VmFault).Count -eq 0) { return }
        if ($GpuPassthroughType -eq 'DirectDeviceAssignment') { $gpu.gpuCount = 1 }
        if ($PSCmdlet.ShouldProcess('the VM', "set $CpuCount processors, $MemoryInMB MB, GPU $GpuPassthroughType")) {
            $null = Set-EflowVM -cpuCount $CpuCount -memoryInMB $MemoryInMB -headless @gpu
        }
        return
    }
    if (-not $AcceptEula) { throw 'the VM can be deployed only with -AcceptEula' }
    $deploy = @{
        acceptEula              = 'Yes'
        acceptOptionalTelemetry = 'No'
        cpuCount                = $CpuCount
        memoryInMB              = $MemoryInMB
        vmDataSize              = $VmDataSize
    }
    if ($VswitchName) { $deploy.vswitchName = $VswitchName; $deploy.vswitchType = $VswitchType }
    if ($Ip4Address) {
        $deploy.ip4Address = "$Ip4Address"
        $deploy.ip4GatewayAddress = "$Ip4GatewayAddress"
        $deploy.ip4PrefixLength = $Ip4PrefixLength
    }
    if ($gpu.Count) { $gpu.gpuCount = 1 }
    if ($PSCmdlet.ShouldProcess('the VM', "deploy with $CpuCount processors, $MemoryInMB MB, GPU $GpuPassthroughType")) {
        Confirm-Ok -Step 'Deploy-Eflow' -Answer (Deploy-Eflow @deploy @gpu)
    }
}

function Confirm-Ok {
    <# Deploy-Eflow and Provision-EflowVm answer OK, or with the reason. #>
    param([string] $Step, [object] $Answer)
    if ("$(@($Answer)[-1])".Trim() -ne 'OK') { throw "$Step failed: $Answer" }
}

function Hide-Secret {
    <# A text without the secret. #>
    param([string] $Text)
    if ($script:hidden) { return $Text.Replace($script:hidden, '***') }
    return $Text
}

function Set-Dns {
    if (-not $DnsServers -or -not $PSCmdlet.ShouldProcess('the VM', "use DNS $DnsServers")) { return }
    $endpoint = @(Get-EflowVmEndpoint)[0].Name
    $null = Set-EflowVmDNSServers -vendpointName $endpoint -dnsServers @($DnsServers | ForEach-Object { "$_" })
}

function Set-Identity {
    <# Gives the VM its identity in IoT Hub. #>
    if ($ProvisioningType -eq 'none') { return }
    # edgeAgent runs only in a VM that has an identity.
    $modules = (Invoke-EflowVmCommand -command 'sudo iotedge list' -ignoreError) -join "`n"
    if (-not $Reprovision -and $modules -match '(?m)^edgeAgent\s+running') { return }
    if (-not $PSCmdlet.ShouldProcess('the VM', "provision by $ProvisioningType")) { return }
    if ($ProvisioningType -eq 'DpsTPM') { $null = Set-EflowVmFeature -feature DpsTpm -enable }
    $identity = @{ provisioningType = $ProvisioningType }
    if ($ScopeId) { $identity.scopeId = $ScopeId }
    if ($RegistrationId) { $identity.registrationId = $RegistrationId }
    if ($IotHubHostname) { $identity.iotHubHostname = $IotHubHostname }
    if ($DeviceId) { $identity.deviceId = $DeviceId }
    if ($IdentityCertPath) { $identity.identityCertPath = (Resolve-Path -LiteralPath $IdentityCertPath).ProviderPath }
    if ($IdentityPrivKeyPath) { $identity.identityPrivKeyPath = (Resolve-Path -LiteralPath $IdentityPrivKeyPath).ProviderPath }
    if ($GlobalEndpoint) { $identity.globalEndpoint = "$GlobalEndpoint" }
    if ($ProvisioningType -in 'ManualConnectionString', 'DpsSymmetricKey') {
        # In the memory of this process only, never on a command line.
        $script:hidden = [System.Net.NetworkCredential]::new('', (Read-Secret)).Password
        if ($ProvisioningType -eq 'DpsSymmetricKey') { $identity.symmKey = $script:hidden }
        else { $identity.devConnString = $script:hidden }
    }
    Confirm-Ok -Step 'Provision-EflowVm' -Answer (Provision-EflowVm -headless @identity)
}

function Get-VmFault {
    <# What the VM has less of than was asked for: Set-EflowVM and updates may reset it. #>
    $has = (Get-EflowVm).SystemStatistics
    $faults = @()
    if ([int] $has.CpuCount -ne $CpuCount) { $faults += "the VM has $($has.CpuCount) processors, not $CpuCount" }
    # The kernel keeps some memory for itself.
    if ([int] $has.TotalMemMb -lt 0.9 * $MemoryInMB) { $faults += "the VM has $($has.TotalMemMb) MB, not $MemoryInMB" }
    $checks = @{
        DirectDeviceAssignment = 'sudo nvidia-smi -L', '^GPU 0'
        ParaVirtualization     = 'ls /dev/dxg', '^/dev/dxg'
    }
    if ($checks.ContainsKey($GpuPassthroughType)) {
        $command, $pattern = $checks[$GpuPassthroughType]
        $answer = (Invoke-EflowVmCommand -command $command -ignoreError) -join "`n"
        if ($answer -notmatch "(?m)$pattern") { $faults += "the VM shows no GPU: $command says $answer" }
    }
    return , $faults
}

try {
    $system = Get-CimInstance -ClassName Win32_OperatingSystem
    $isServer = $system.ProductType -ne 1
    $faults = @(Get-ArgumentFault -IsServer $isServer)
    if ($faults) { $faults | ForEach-Object { Write-Warning -Message $_ }; exit 2 }
    $faults = @(Get-WindowsFault -System $system -IsServer $isServer)
    if ($faults) { $faults | ForEach-Object { Write-Warning -Message $_ }; exit 3 }
    if (Enable-HyperV -IsServer $isServer) {
        Write-Warning -Message 'restart Windows, then start this script again'
        exit $RestartExitCode
    }
    Initialize-Switch
    Install-Eflow
    if (-not (Get-Module -Name AzureEFLOW -ListAvailable)) {
        if ($WhatIfPreference) { exit 0 }
        throw 'the PowerShell module AzureEFLOW is missing after the installation'
    }
    Import-Module -Name AzureEFLOW
    Install-Vm
    if (-not (Verify-EflowVm)) {
        if ($WhatIfPreference) { exit 0 }
        throw 'there is no VM after the deployment'
    }
    Set-Dns
    Set-Identity
    $faults = Get-VmFault
    if ($faults.Count -and -not $WhatIfPreference) { throw ($faults -join '; ') }
    Write-Output -InputObject 'done'
    exit 0
}
catch {
    # The message only: the failed command holds the secret.
    Write-Warning -Message (Hide-Secret -Text $_.Exception.Message)
    exit 1
}
