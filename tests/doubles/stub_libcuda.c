/* A scripted NVIDIA driver: what it answers stands in the environment, so that the real CUDA libraries and the
 * real onnxruntime provider can be made to fail as they do on broken hosts. It cannot compute anything.
 *
 *   STUB_INIT=N          what cuInit and everything behind it answers (default 100, no device)
 *   STUB_VERSION=N       what cuDriverGetVersion tells (default 12080, CUDA 12.8)
 *   STUB_CAPABILITY=NN   the compute capability of its one device (default 75); it is there when STUB_INIT=0
 *   STUB_FREE_MIB=N      its free memory (default 8192)
 *   STUB_DOES=hang|crash what cuInit does instead of answering
 */
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define EXPORTED __attribute__((visibility("default")))
#define NOT_SUPPORTED 801
#define TOTAL_MIB 16384UL

static long number(const char *name, long otherwise)
{
    const char *text = getenv(name);
    return text ? strtol(text, NULL, 10) : otherwise;
}

static int state(void) { return (int)number("STUB_INIT", 100); }

EXPORTED int cuInit(unsigned flags)
{
    const char *deed = getenv("STUB_DOES");
    (void)flags;
    if (deed && strcmp(deed, "hang") == 0)
        for (;;)
            pause();
    if (deed && strcmp(deed, "crash") == 0)
        raise(SIGSEGV);
    return state();
}

EXPORTED int cuDriverGetVersion(int *version)
{
    *version = (int)number("STUB_VERSION", 12080);
    return 0;
}

EXPORTED int cuDeviceGetCount(int *count)
{
    *count = state() == 0;
    return state();
}

EXPORTED int cuDeviceGet(int *device, int ordinal)
{
    *device = ordinal;
    return state();
}

EXPORTED int cuDeviceGetName(char *name, int length, int device)
{
    (void)device;
    strncpy(name, "Scripted GPU", (size_t)length);
    return state();
}

EXPORTED int cuDeviceGetAttribute(int *value, int attribute, int device)
{
    long capability = number("STUB_CAPABILITY", 75);
    (void)device;
    *value = attribute == 75 ? (int)(capability / 10) : attribute == 76 ? (int)(capability % 10) : 1;
    return state();
}

EXPORTED int cuDeviceTotalMem_v2(size_t *bytes, int device)
{
    (void)device;
    *bytes = TOTAL_MIB << 20;
    return state();
}

EXPORTED int cuDevicePrimaryCtxRetain(void **context, int device)
{
    static int anything;
    (void)device;
    *context = &anything;
    return state();
}

EXPORTED int cuDevicePrimaryCtxRelease_v2(int device) { (void)device; return state(); }
EXPORTED int cuCtxSetCurrent(void *context) { (void)context; return state(); }

EXPORTED int cuMemGetInfo_v2(size_t *free_bytes, size_t *total_bytes)
{
    *free_bytes = (size_t)number("STUB_FREE_MIB", 8192) << 20;
    *total_bytes = TOTAL_MIB << 20;
    return state();
}

EXPORTED int cuGetErrorName(int error, const char **name)
{
    (void)error;
    *name = "CUDA_ERROR_BY_SCRIPT";
    return 0;
}

EXPORTED int cuGetErrorString(int error, const char **text)
{
    (void)error;
    *text = "as the script has it";
    return 0;
}

/* Whatever else is asked for fails as cuInit does, or as something that this device cannot do. */
static int anything_else(void) { return state() ? state() : NOT_SUPPORTED; }

EXPORTED int cuGetExportTable(const void **table, const void *id)
{
    (void)id;
    *table = NULL;
    return anything_else();
}

EXPORTED int cuGetProcAddress_v2(const char *name, void **function, int version, unsigned long long flags, int *found)
{
    static const struct { const char *name; void *function; } known[] = {
        {"cuInit", cuInit},
        {"cuDriverGetVersion", cuDriverGetVersion},
        {"cuDeviceGetCount", cuDeviceGetCount},
        {"cuDeviceGet", cuDeviceGet},
        {"cuDeviceGetName", cuDeviceGetName},
        {"cuDeviceGetAttribute", cuDeviceGetAttribute},
        {"cuDeviceTotalMem", cuDeviceTotalMem_v2},
        {"cuGetErrorName", cuGetErrorName},
        {"cuGetErrorString", cuGetErrorString},
        {"cuGetExportTable", cuGetExportTable},
        {"cuGetProcAddress", cuGetProcAddress_v2},
    };
    (void)version;
    (void)flags;
    if (found)
        *found = 0;
    *function = (void *)anything_else;
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (strcmp(name, known[i].name) == 0)
            *function = known[i].function;
    return 0;
}

EXPORTED int cuGetProcAddress(const char *name, void **function, int version, unsigned long long flags)
{
    return cuGetProcAddress_v2(name, function, version, flags, NULL);
}
