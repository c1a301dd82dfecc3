/* GPUs that do not exist: the parts of the CUDA runtime, the CUDA driver and cuBLAS that PyTorch calls, without a device.
 *
 * Loaded before the real libraries (LD_PRELOAD), this makes a CUDA build of PyTorch believe in NO_GPU_COUNT devices of
 * NO_GPU_BYTES each. Memory is reserved address space that nobody touches, kernels and matrix products do not run, and
 * streams finish at once. All that PyTorch does around them is real: its caching allocator, autograd, FSDP, the order
 * of operations and their shapes. So memory and operations of a step can be measured, and values cannot.
 *
 * A value that is read back from a device is 0; a single byte is 1, as questions of one byte ("all finite?", "all
 * equal?") go on with yes.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "driver_types.h"

enum { SUCCESS = 0, OUT_OF_MEMORY = 2 };
enum { TO_DEVICE = 1, TO_HOST = 2 };
#define LARGEST_READ (1u << 20) /* bytes of a copy to the host that are written; more would cost the host's memory */

/* ---------------------------------------------------------------- what the devices are, by environment variables */

static long number(const char *name, long otherwise) {
  const char *text = getenv(name);
  return text ? atol(text) : otherwise;
}
static int devices(void) { return (int)number("NO_GPU_COUNT", 1); }
static size_t capacity(void) { return (size_t)number("NO_GPU_BYTES", 80l << 30); }
static int major(void) { return (int)number("NO_GPU_MAJOR", 9); }
static int minor(void) { return (int)number("NO_GPU_MINOR", 0); }
static __thread int current = 0;

/* ---------------------------------------------------------------- counters, read from Python by ctypes */

enum { ALLOCATED, KERNELS, PRODUCTS, WAITS, COPIES_TO_HOST, COPIES_TO_DEVICE, COUNTERS };
static size_t counters[COUNTERS];
static void count(int which) { __sync_add_and_fetch(&counters[which], 1); }
size_t no_gpu_counter(int which) { return counters[which]; }

/* ---------------------------------------------------------------- devices */

int cudaGetDeviceCount(int *out) { return *out = devices(), SUCCESS; }
int cudaGetDevice(int *out) { return *out = current, SUCCESS; }
int cudaSetDevice(int device) { return current = device, SUCCESS; }
int cudaDriverGetVersion(int *out) { return *out = 13020, SUCCESS; }
int cudaRuntimeGetVersion(int *out) { return *out = 13020, SUCCESS; }
int cudaGetLastError(void) { return SUCCESS; }
int cudaPeekAtLastError(void) { return SUCCESS; }
const char *cudaGetErrorString(int error) { return error == OUT_OF_MEMORY ? "out of memory" : "no error"; }
const char *cudaGetErrorName(int error) { return error == OUT_OF_MEMORY ? "cudaErrorMemoryAllocation" : "cudaSuccess"; }
int cudaDeviceSynchronize(void) { return count(WAITS), SUCCESS; }
int cudaDeviceCanAccessPeer(int *out, int device, int peer) { return *out = 1, SUCCESS; }
int cudaDeviceEnablePeerAccess(int peer, unsigned flags) { return SUCCESS; }
int cudaDeviceGetDefaultMemPool(void **out, int device) { return *out = (void *)1, SUCCESS; }
int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
  if (least) *least = 0;
  if (greatest) *greatest = -5;
  return SUCCESS;
}
int cudaDeviceGetPCIBusId(char *out, int size, int device) {
  const char digits[] = "0123456789abcdef";
  char id[] = "0000:00:00.0";
  id[6] = digits[device & 15];
  strncpy(out, id, size);
  return SUCCESS;
}
int cudaProfilerStart(void) { return SUCCESS; }
int cudaProfilerStop(void) { return SUCCESS; }

int cudaGetDeviceProperties(struct cudaDeviceProp *out, int device) {
  const char *name = getenv("NO_GPU_NAME");
  memset(out, 0, sizeof *out);
  strncpy(out->name, name ? name : "simulated GPU", sizeof out->name - 1);
  out->totalGlobalMem = capacity();
  out->major = major();
  out->minor = minor();
  out->multiProcessorCount = (int)number("NO_GPU_PROCESSORS", 132);
  out->warpSize = 32;
  out->maxThreadsPerBlock = out->maxThreadsDim[0] = out->maxThreadsDim[1] = 1024;
  out->maxThreadsDim[2] = 64;
  out->maxGridSize[0] = 2147483647;
  out->maxGridSize[1] = out->maxGridSize[2] = 65535;
  out->maxThreadsPerMultiProcessor = 2048;
  out->maxBlocksPerMultiProcessor = 32;
  out->regsPerBlock = out->regsPerMultiprocessor = 65536;
  out->sharedMemPerBlock = 48 << 10;
  out->sharedMemPerBlockOptin = 227 << 10;
  out->sharedMemPerMultiprocessor = 228 << 10;
  out->totalConstMem = 64 << 10;
  out->l2CacheSize = 50 << 20;
  out->memoryBusWidth = 5120;
  out->textureAlignment = 512;
  out->memPitch = 2147483647;
  out->unifiedAddressing = 1;
  return SUCCESS;
}

int cudaDeviceGetAttribute(int *out, int attribute, int device) {
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock: case cudaDevAttrMaxBlockDimX: case cudaDevAttrMaxBlockDimY: *out = 1024; break;
    case cudaDevAttrMaxBlockDimZ: *out = 64; break;
    case cudaDevAttrMaxGridDimX: *out = 2147483647; break;
    case cudaDevAttrMaxGridDimY: case cudaDevAttrMaxGridDimZ: *out = 65535; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *out = 48 << 10; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *out = 227 << 10; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *out = 228 << 10; break;
    case cudaDevAttrWarpSize: *out = 32; break;
    case cudaDevAttrMaxRegistersPerBlock: *out = 65536; break;
    case cudaDevAttrMultiProcessorCount: *out = (int)number("NO_GPU_PROCESSORS", 132); break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *out = 2048; break;
    case cudaDevAttrL2CacheSize: *out = 50 << 20; break;
    case cudaDevAttrComputeCapabilityMajor: *out = major(); break;
    case cudaDevAttrComputeCapabilityMinor: *out = minor(); break;
    case cudaDevAttrMaxBlocksPerMultiprocessor: *out = 32; break;
    default: *out = 0;
  }
  return SUCCESS;
}

/* ---------------------------------------------------------------- memory: address space that is reserved, no more */

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct Region { char *start; size_t size; int pinned; } *regions; /* of devices, and pinned ones of the host */
static size_t known, room;

static int remember(void *start, size_t size, int pinned) {
  if (known == room) {
    struct Region *larger = realloc(regions, (room ? 2 * room : 1024) * sizeof *regions);
    if (!larger) return 0;
    regions = larger;
    room = room ? 2 * room : 1024;
  }
  regions[known++] = (struct Region){start, size, pinned};
  return 1;
}
static struct Region forget(const void *start) {
  struct Region found = {NULL, 0, 0};
  for (size_t i = 0; start && i < known; i++)
    if (regions[i].start == (const char *)start) {
      found = regions[i];
      regions[i] = regions[--known];
      break;
    }
  return found;
}

int cudaMalloc(void **out, size_t size) {
  int error = OUT_OF_MEMORY;
  *out = NULL;
  pthread_mutex_lock(&lock);
  if (counters[ALLOCATED] + size <= capacity()) {
    void *start = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start != MAP_FAILED && remember(start, size, 0)) {
      counters[ALLOCATED] += size;
      *out = start;
      error = SUCCESS;
    }
  }
  pthread_mutex_unlock(&lock);
  return error;
}
int cudaFree(void *start) {
  pthread_mutex_lock(&lock);
  struct Region found = forget(start);
  if (found.start) munmap(found.start, found.size);
  counters[ALLOCATED] -= found.size;
  pthread_mutex_unlock(&lock);
  return SUCCESS;
}
static int kind_of(const void *at) {
  int kind = cudaMemoryTypeUnregistered;
  pthread_mutex_lock(&lock);
  for (size_t i = 0; i < known && kind == cudaMemoryTypeUnregistered; i++)
    if ((const char *)at >= regions[i].start && (const char *)at < regions[i].start + regions[i].size)
      kind = regions[i].pinned ? cudaMemoryTypeHost : cudaMemoryTypeDevice;
  pthread_mutex_unlock(&lock);
  return kind;
}
int cudaMallocAsync(void **out, size_t size, void *stream) { return cudaMalloc(out, size); }
int cudaFreeAsync(void *start, void *stream) { return cudaFree(start); }
int cudaMallocManaged(void **out, size_t size, unsigned flags) { return cudaMalloc(out, size); }
int cudaHostAlloc(void **out, size_t size, unsigned flags) {
  if (posix_memalign(out, 4096, size ? size : 1)) return OUT_OF_MEMORY;
  pthread_mutex_lock(&lock);
  int kept = remember(*out, size, 1);
  pthread_mutex_unlock(&lock);
  return kept ? SUCCESS : OUT_OF_MEMORY;
}
int cudaMallocHost(void **out, size_t size) { return cudaHostAlloc(out, size, 0); }
int cudaFreeHost(void *start) {
  pthread_mutex_lock(&lock);
  forget(start);
  pthread_mutex_unlock(&lock);
  return free(start), SUCCESS;
}
int cudaHostRegister(void *start, size_t size, unsigned flags) { return SUCCESS; }
int cudaHostUnregister(void *start) { return SUCCESS; }
int cudaMemGetInfo(size_t *unused, size_t *total) {
  *total = capacity();
  *unused = *total - counters[ALLOCATED];
  return SUCCESS;
}
int cudaPointerGetAttributes(struct cudaPointerAttributes *out, const void *at) {
  memset(out, 0, sizeof *out);
  out->type = kind_of(at);
  out->device = current;
  out->devicePointer = (void *)at;
  return SUCCESS;
}
static void copy(void *to, size_t size, int direction) {
  if (direction == TO_DEVICE) count(COPIES_TO_DEVICE);
  if (direction == TO_HOST) count(COPIES_TO_HOST);
  if (direction == TO_HOST && size <= LARGEST_READ) memset(to, size == 1, size);
}
int cudaMemcpy(void *to, const void *from, size_t size, int direction) {
  return copy(to, size, direction), count(WAITS), SUCCESS;
}
int cudaMemcpyAsync(void *to, const void *from, size_t size, int direction, void *stream) {
  return copy(to, size, direction), SUCCESS;
}
int cudaMemcpyPeerAsync(void *to, int there, const void *from, int here, size_t size, void *stream) { return SUCCESS; }
int cudaMemcpyToSymbol(const void *to, const void *from, size_t size, size_t offset, int direction) { return SUCCESS; }
int cudaMemset(void *start, int value, size_t size) { return SUCCESS; }
int cudaMemsetAsync(void *start, int value, size_t size, void *stream) { return SUCCESS; }
int cudaMemPoolGetAttribute(void *pool, int attribute, void *out) { return *(uint64_t *)out = 0, SUCCESS; }
int cudaMemPoolSetAttribute(void *pool, int attribute, void *value) { return SUCCESS; }
int cudaMemPoolSetAccess(void *pool, void *access, size_t number) { return SUCCESS; }
int cudaMemPoolTrimTo(void *pool, size_t size) { return SUCCESS; }

/* ---------------------------------------------------------------- streams and events: all is done at once */

static int handle(void **out) {
  static uintptr_t last = 0x1000;
  *out = (void *)__sync_add_and_fetch(&last, 16);
  return SUCCESS;
}
int cudaStreamCreate(void **out) { return handle(out); }
int cudaStreamCreateWithFlags(void **out, unsigned flags) { return handle(out); }
int cudaStreamCreateWithPriority(void **out, unsigned flags, int priority) { return handle(out); }
int cudaStreamDestroy(void *stream) { return SUCCESS; }
int cudaStreamQuery(void *stream) { return SUCCESS; }
int cudaStreamSynchronize(void *stream) { return count(WAITS), SUCCESS; }
int cudaStreamWaitEvent(void *stream, void *event, unsigned flags) { return SUCCESS; }
int cudaStreamGetPriority(void *stream, int *out) { return *out = 0, SUCCESS; }
int cudaStreamIsCapturing(void *stream, int *out) { return *out = 0, SUCCESS; }
int cudaStreamGetCaptureInfo(void *stream, int *status, unsigned long long *id) {
  *status = 0;
  if (id) *id = 0;
  return SUCCESS;
}
int cudaThreadExchangeStreamCaptureMode(int *mode) { return SUCCESS; }
int cudaStreamAddCallback(void *stream, void (*call)(void *, int, void *), void *data, unsigned flags) {
  return call(stream, SUCCESS, data), SUCCESS;
}
int cudaLaunchHostFunc(void *stream, void (*call)(void *), void *data) { return call(data), SUCCESS; }
int cudaEventCreate(void **out) { return handle(out); }
int cudaEventCreateWithFlags(void **out, unsigned flags) { return handle(out); }
int cudaEventDestroy(void *event) { return SUCCESS; }
int cudaEventQuery(void *event) { return SUCCESS; }
int cudaEventRecord(void *event, void *stream) { return SUCCESS; }
int cudaEventRecordWithFlags(void *event, void *stream, unsigned flags) { return SUCCESS; }
int cudaEventSynchronize(void *event) { return count(WAITS), SUCCESS; }
int cudaEventElapsedTime(float *out, void *start, void *end) { return *out = 0.001f, SUCCESS; }

/* ---------------------------------------------------------------- kernels: registered and launched, and nothing runs */

int cudaLaunchKernel(const void *kernel) { return count(KERNELS), SUCCESS; }
int __cudaLaunchKernel(void *kernel) { return count(KERNELS), SUCCESS; }
int cudaLaunchKernelExC(const void *config, const void *kernel, void **arguments) { return count(KERNELS), SUCCESS; }
unsigned __cudaPushCallConfiguration(void) { return 0; }
int __cudaPopCallConfiguration(void) { return SUCCESS; }
int __cudaGetKernel(void **out, const void *entry) { return *out = (void *)entry, SUCCESS; }
void **__cudaRegisterFatBinary(void *binary) { static void *handles[4]; return handles; }
void __cudaRegisterFatBinaryEnd(void **handles) {}
void __cudaUnregisterFatBinary(void **handles) {}
void __cudaRegisterFunction(void) {}
void __cudaRegisterVar(void) {}
int cudaFuncGetAttributes(struct cudaFuncAttributes *out, const void *kernel) {
  memset(out, 0, sizeof *out);
  out->maxThreadsPerBlock = 1024;
  out->numRegs = 32;
  out->ptxVersion = out->binaryVersion = 10 * major() + minor();
  out->maxDynamicSharedSizeBytes = 227 << 10;
  return SUCCESS;
}
int cudaFuncSetAttribute(const void *kernel, int attribute, int value) { return SUCCESS; }
int cudaKernelSetAttributeForDevice(void *kernel, int attribute, int value, int device) { return SUCCESS; }
int cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *out, const void *kernel, int threads, size_t shared) {
  return *out = 4, SUCCESS;
}
int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *out, const void *kernel, int threads, size_t shared,
                                                           unsigned flags) {
  return *out = 4, SUCCESS;
}
int cudaGetSymbolAddress(void **out, const void *symbol) {
  static void *place; /* one for all symbols, outside of the devices' memory, as nothing is stored there */
  if (!place) place = calloc(1, 1 << 20);
  *out = place;
  return SUCCESS;
}

/* ---------------------------------------------------------------- the driver */

static int succeed(void) { return SUCCESS; }
int cudaGetDriverEntryPointByVersion(const char *name, void **out, unsigned version, unsigned long long flags,
                                     int *status) {
  *out = (void *)succeed;
  if (status) *status = 0;
  return SUCCESS;
}
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
  *flags = 0;
  *active = 1;
  return SUCCESS;
}
int cuDevicePrimaryCtxRetain(void **out, int device) { return *out = (void *)1, SUCCESS; }
int cuCtxGetCurrent(void **out) { return *out = (void *)1, SUCCESS; }
int cuDeviceGet(int *out, int ordinal) { return *out = ordinal, SUCCESS; }
int cuDeviceGetAttribute(int *out, int attribute, int device) { return cudaDeviceGetAttribute(out, attribute, device); }
int cuGetErrorString(int error, const char **out) { return *out = "no error", SUCCESS; }

#define SUCCEEDS(name) int name(void) { return SUCCESS; }
SUCCEEDS(cuInit) SUCCEEDS(cuCtxSetCurrent) SUCCEEDS(cuPointerGetAttribute) SUCCEEDS(cuTensorMapEncodeTiled)
SUCCEEDS(cuModuleLoad) SUCCEEDS(cuModuleLoadData) SUCCEEDS(cuModuleLoadDataEx) SUCCEEDS(cuModuleUnload)
SUCCEEDS(cuModuleGetFunction) SUCCEEDS(cuFuncGetAttribute) SUCCEEDS(cuFuncSetAttribute) SUCCEEDS(cuFuncSetCacheConfig)
SUCCEEDS(cuLaunchKernel) SUCCEEDS(cuLaunchCooperativeKernel) SUCCEEDS(cuOccupancyMaxActiveBlocksPerMultiprocessor)
SUCCEEDS(cuLinkCreate_v2) SUCCEEDS(cuLinkAddData_v2) SUCCEEDS(cuLinkComplete)

/* ---------------------------------------------------------------- cuBLAS */

int cublasCreate_v2(void **out) { return handle(out); }
SUCCEEDS(cublasDestroy_v2) SUCCEEDS(cublasSetMathMode) SUCCEEDS(cublasSetPointerMode_v2) SUCCEEDS(cublasSetStream_v2)
SUCCEEDS(cublasSetWorkspace_v2) SUCCEEDS(cublasSetSmCountTarget)
int cublasGetMathMode(void *blas, int *out) { return *out = 0, SUCCESS; }
int cublasGetPointerMode_v2(void *blas, int *out) { return *out = 0, SUCCESS; }

#define MULTIPLIES(name) int name(void) { return count(PRODUCTS), SUCCESS; }
MULTIPLIES(cublasGemmEx) MULTIPLIES(cublasGemmStridedBatchedEx) MULTIPLIES(cublasGemmBatchedEx)
MULTIPLIES(cublasSgemm_v2) MULTIPLIES(cublasSgemmEx) MULTIPLIES(cublasSgemmStridedBatched) MULTIPLIES(cublasSgemv_v2)
MULTIPLIES(cublasDgemm_v2) MULTIPLIES(cublasDgemmStridedBatched) MULTIPLIES(cublasDgemv_v2) MULTIPLIES(cublasHgemm)
MULTIPLIES(cublasDotEx) MULTIPLIES(cublasSdot_v2) MULTIPLIES(cublasDdot_v2) MULTIPLIES(cublasLtMatmul)

size_t cublasLtGetVersion(void) { return 130200; }
int cublasLtMatmulAlgoGetHeuristic(void *blas, void *operation, void *a, void *b, void *c, void *d, void *preference,
                                   int wanted, void *results, int *found) {
  return *found = 1, SUCCESS;
}
int cublasLtMatmulDescCreate(void **out) { return handle(out); }
int cublasLtMatmulPreferenceCreate(void **out) { return handle(out); }
int cublasLtMatrixLayoutCreate(void **out) { return handle(out); }
SUCCEEDS(cublasLtMatmulAlgoCheck) SUCCEEDS(cublasLtMatmulAlgoConfigGetAttribute)
SUCCEEDS(cublasLtMatmulAlgoConfigSetAttribute) SUCCEEDS(cublasLtMatmulAlgoInit)
SUCCEEDS(cublasLtMatmulDescDestroy) SUCCEEDS(cublasLtMatmulDescSetAttribute)
SUCCEEDS(cublasLtMatmulPreferenceDestroy) SUCCEEDS(cublasLtMatmulPreferenceSetAttribute)
SUCCEEDS(cublasLtMatrixLayoutDestroy) SUCCEEDS(cublasLtMatrixLayoutSetAttribute)
