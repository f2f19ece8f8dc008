/*
 * The part of the Ascend runtime that torch_npu calls, over host memory: device memory is malloc, a
 * stream runs nothing, an event is a time stamp. Kernels are not here; an attempt to run one fails.
 *
 * Signatures follow acl/acl_rt.h as far as the caller passes arguments; what is not used is left out.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef int aclError;
enum {
    SUCCESS = 0,
    INVALID_DEVICE = 107001,
    NO_CONTEXT = 107002,
    OUT_OF_MEMORY = 207001,
    NOT_SUPPORTED = 500002,
};
enum { CORES = 24, GIB = 30, ALIGNMENT = 512 };

/* ---- devices and contexts: one device, or as many as NPUSIM_DEVICES says, which may be none; a
 * context is a marker that nobody reads ---- */

static __thread int current_device = -1;
static int context;

aclError aclInit(const char *config) { return SUCCESS; }
aclError aclFinalize(void) { return SUCCESS; }

static int devices(void)
{
    const char *wanted = getenv("NPUSIM_DEVICES");
    return wanted ? atoi(wanted) : 1;
}

aclError aclrtGetDeviceCount(uint32_t *count) { *count = devices(); return SUCCESS; }

aclError aclrtSetDevice(int device)
{
    if (device < 0 || device >= devices())
        return INVALID_DEVICE;
    current_device = device;
    return SUCCESS;
}

aclError aclrtGetDevice(int *device)
{
    if (current_device < 0)
        return NO_CONTEXT;
    *device = current_device;
    return SUCCESS;
}

aclError aclrtResetDevice(int device) { return SUCCESS; }
aclError aclrtGetCurrentContext(void **current) { *current = &context; return SUCCESS; }
aclError aclrtSetCurrentContext(void *current) { return SUCCESS; }

aclError aclrtGetPrimaryCtxState(int32_t device, uint32_t *flags, int32_t *active)
{
    if (flags)
        *flags = 0;
    *active = current_device == device;
    return SUCCESS;
}

aclError aclrtGetLogicDevIdByUserDevId(int32_t user, int32_t *logic) { *logic = user; return SUCCESS; }
aclError aclrtDeviceCanAccessPeer(int32_t *can, int device, int peer) { *can = 0; return SUCCESS; }
aclError aclrtDeviceGetBareTgid(int32_t *pid) { *pid = 1; return SUCCESS; }

/* An Atlas A2, the product that the limits of npusim are those of. */
const char *aclrtGetSocName(void) { return "Ascend910B2"; }
const char *aclGetRecentErrMsg(void) { return ""; }

aclError aclrtGetDeviceInfo(uint32_t device, int what, int64_t *value) { *value = CORES; return SUCCESS; }
aclError aclGetDeviceCapability(uint32_t device, int what, int64_t *value) { *value = CORES; return SUCCESS; }
aclError aclrtGetDeviceResLimit(int device, int what, uint32_t *value) { *value = CORES; return SUCCESS; }
aclError aclrtGetStreamResLimit(void *stream, int what, uint32_t *value) { *value = CORES; return SUCCESS; }
aclError aclrtGetResInCurrentThread(int what, uint32_t *value) { *value = CORES; return SUCCESS; }
aclError aclrtGetSysParamOpt(int option, int64_t *value) { *value = 0; return SUCCESS; }

aclError aclsysGetVersionStr(char *package, char *version) { strcpy(version, "8.5.0"); return SUCCESS; }
aclError aclGetCannAttributeList(const void **list, size_t *count) { *count = 0; return SUCCESS; }
size_t aclGetCompileoptSize(int option) { return 2; }

aclError aclGetCompileopt(int option, char *value, size_t size)
{
    snprintf(value, size, "0");
    return SUCCESS;
}

/* ---- memory ---- */

static aclError allocate(void **pointer, size_t size)
{
    size_t rounded = (size + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    *pointer = aligned_alloc(ALIGNMENT, rounded ? rounded : ALIGNMENT);
    return *pointer ? SUCCESS : OUT_OF_MEMORY;
}

aclError aclrtMalloc(void **pointer, size_t size, int policy) { return allocate(pointer, size); }
aclError aclrtMallocAlign32(void **pointer, size_t size, int policy) { return allocate(pointer, size); }
aclError aclrtMallocHost(void **pointer, size_t size) { return allocate(pointer, size); }
aclError aclrtMallocHostWithCfg(void **pointer, uint64_t size, void *c) { return allocate(pointer, size); }
aclError aclrtFree(void *pointer) { free(pointer); return SUCCESS; }
aclError aclrtFreeHost(void *pointer) { free(pointer); return SUCCESS; }

aclError aclrtMemcpy(void *to, size_t room, const void *from, size_t size, int kind)
{
    memmove(to, from, size);
    return SUCCESS;
}

aclError aclrtMemcpyAsync(void *to, size_t room, const void *from, size_t size, int kind, void *stream)
{
    return aclrtMemcpy(to, room, from, size, kind);
}

aclError aclrtMemcpyAsyncWithCondition(void *to, size_t room, const void *from, size_t size, int kind,
                                       void *stream)
{
    return aclrtMemcpy(to, room, from, size, kind);
}

aclError aclrtMemset(void *to, size_t room, int value, size_t size)
{
    memset(to, value, size);
    return SUCCESS;
}

aclError aclrtMemsetAsync(void *to, size_t room, int value, size_t size, void *stream)
{
    return aclrtMemset(to, room, value, size);
}

aclError aclrtGetMemInfo(int kind, size_t *unused, size_t *total)
{
    *unused = 60ull << GIB;
    *total = 64ull << GIB;
    return SUCCESS;
}

aclError aclrtGetMemUsageInfo(int device, void *info, size_t size, size_t *count)
{
    *count = 0;
    return SUCCESS;
}

/* Asked of host pointers only: an unregistered one, so that torch_npu treats it as pageable. */
aclError aclrtPointerGetAttributes(const void *pointer, uint32_t *attributes)
{
    memset(attributes, 0, 28);
    attributes[1] = 2;
    return SUCCESS;
}

/* ---- streams and events: work is done when it is handed over ---- */

typedef struct { int32_t id; } Stream;
typedef struct { uint64_t microseconds; } Event;

static aclError new_stream(void **stream)
{
    static int32_t streams = 0;
    Stream *made = malloc(sizeof *made);
    made->id = ++streams;
    *stream = made;
    return SUCCESS;
}

aclError aclrtCreateStream(void **stream) { return new_stream(stream); }
aclError aclrtCreateStreamWithConfig(void **stream, uint32_t priority, uint32_t flags) { return new_stream(stream); }
aclError aclrtDestroyStream(void *stream) { free(stream); return SUCCESS; }
aclError aclrtDestroyStreamForce(void *stream) { free(stream); return SUCCESS; }
aclError aclrtStreamGetId(void *stream, int32_t *id) { *id = stream ? ((Stream *)stream)->id : 0; return SUCCESS; }
aclError aclrtStreamQuery(void *stream, int *status) { *status = 0; return SUCCESS; }
aclError aclrtGetStreamOverflowSwitch(void *stream, uint32_t *on) { *on = 0; return SUCCESS; }
aclError aclmdlRICaptureGetInfo(void *stream, int *status, void **model)
{
    *status = 0;
    if (model)
        *model = NULL;
    return SUCCESS;
}

static aclError new_event(void **event)
{
    *event = calloc(1, sizeof(Event));
    return SUCCESS;
}

aclError aclrtCreateEventWithFlag(void **event, uint32_t flags) { return new_event(event); }
aclError aclrtCreateEventExWithFlag(void **event, uint32_t flags) { return new_event(event); }
aclError aclrtDestroyEvent(void *event) { free(event); return SUCCESS; }

aclError aclrtRecordEvent(void *event, void *stream)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    ((Event *)event)->microseconds = now.tv_sec * 1000000ull + now.tv_nsec / 1000;
    return SUCCESS;
}

aclError aclrtQueryEventStatus(void *event, int *done) { *done = 1; return SUCCESS; }
aclError aclrtQueryEventWaitStatus(void *event, int *status) { *status = 0; return SUCCESS; }
aclError aclQueryEventRecordedStatus(void *event, int *done) { *done = 1; return SUCCESS; }
aclError aclQueryEventWaitStatus(void *event, int *status) { *status = 0; return SUCCESS; }

aclError aclrtEventElapsedTime(float *milliseconds, void *start, void *end)
{
    *milliseconds = (((Event *)end)->microseconds - ((Event *)start)->microseconds) / 1000.0f;
    return SUCCESS;
}

aclError aclrtEventGetTimestamp(void *event, uint64_t *microseconds)
{
    *microseconds = ((Event *)event)->microseconds;
    return SUCCESS;
}

/* ---- kernels: none; nothing may appear to have run ---- */

static aclError refuse(const char *call, const char *what)
{
    fprintf(stderr, "npusim: %s(%s): the simulated device runs no kernels\n", call, what ? what : "");
    return NOT_SUPPORTED;
}

aclError aclopCompileAndExecute(const char *name) { return refuse("aclopCompileAndExecute", name); }
aclError aclopCompileAndExecuteV2(const char *name) { return refuse("aclopCompileAndExecuteV2", name); }
aclError rtKernelLaunch(void) { return refuse("rtKernelLaunch", NULL); }
aclError aclrtLaunchKernelWithHostArgs(void) { return refuse("aclrtLaunchKernelWithHostArgs", NULL); }
aclError aclrtReserveMemAddress(void) { return refuse("aclrtReserveMemAddress", NULL); }

/* What describes a kernel to run: made, and never used. */
static int description;
void *aclopCreateAttr(void) { return &description; }
void *aclCreateTensorDesc(void) { return &description; }
void *aclCreateDataBuffer(void) { return &description; }

/* ---- looked up by name where used: settings that are ignored, waits that have nothing to wait for ---- */

aclError aclSetCompileopt(int option, const char *value) { return SUCCESS; }
aclError aclrtCtxSetSysParamOpt(int option, int64_t value) { return SUCCESS; }
aclError aclrtSetDeviceSatMode(int mode) { return SUCCESS; }
aclError aclrtSetOpExecuteTimeOut(uint32_t seconds) { return SUCCESS; }
aclError aclrtSynchronizeDeviceWithTimeout(int32_t milliseconds) { return SUCCESS; }
aclError aclrtSynchronizeStreamWithTimeout(void *stream, int32_t milliseconds) { return SUCCESS; }
