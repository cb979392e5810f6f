/* SPDX-License-Identifier: Apache-2.0 */
/* A libcuda.so.1 without a GPU: Triton's launcher links to it, and each launch goes to a function of Python's.

   All that the launcher and the loader of Triton 3.6 to 3.9 call is here; device.py says what becomes of a launch. */
#include "cuda.h"
#include <string.h>

typedef CUresult (*launch_handler)(CUfunction, const unsigned *grid, unsigned shared_bytes, void **params);
static launch_handler handler;
static CUcontext context = (CUcontext)0x1000;
static size_t modules;

void set_launch_handler(launch_handler new_handler) { handler = new_handler; }

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **params, void **extra) {
    const unsigned grid[3] = {config->gridDimX, config->gridDimY, config->gridDimZ};
    return handler ? handler(function, grid, config->sharedMemBytes, params) : CUDA_SUCCESS;
}

/* A kernel is known by its module's number. */
CUresult cuModuleLoadData(CUmodule *module, const void *image) {
    *module = (CUmodule)(0x2000 + ++modules);
    return CUDA_SUCCESS;
}
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
    *function = (CUfunction)module;
    return CUDA_SUCCESS;
}

/* A pointer is what the tensor says: device memory is the process's own. */
CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
    *(CUdeviceptr *)data = pointer;
    return CUDA_SUCCESS;
}
CUresult cuPointerGetAttributes(unsigned count, CUpointer_attribute *attributes, void **data, CUdeviceptr pointer) {
    for (unsigned i = 0; i < count; i++) {
        if (attributes[i] == CU_POINTER_ATTRIBUTE_DEVICE_POINTER)
            *(CUdeviceptr *)data[i] = pointer;
        else
            *(int *)data[i] = 0;
    }
    return CUDA_SUCCESS;
}

/* An H200's numbers, where the launcher looks at one. */
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    *value = attribute == CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN ? 232448
             : attribute == CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT            ? 132
             : attribute == CU_DEVICE_ATTRIBUTE_WARP_SIZE                       ? 32
                                                                                : 0;
    return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
    *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
    return CUDA_SUCCESS;
}
CUresult cuDriverGetVersion(int *version) { *version = 13000; return CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult error, const char **text) { *text = "emulator's fault"; return CUDA_SUCCESS; }

/* One context and one device, without limits to set. */
CUresult cuCtxGetCurrent(CUcontext *current) { *current = context; return CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext new_context) { context = new_context; return CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { *value = 0; return CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) { *device = ordinal; return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *retained, CUdevice device) { *retained = context; return CUDA_SUCCESS; }
CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute attribute, int value) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction f, CUfunc_cache config) { return CUDA_SUCCESS; }
CUresult cuOccupancyMaxActiveClusters(int *clusters, CUfunction f, const CUlaunchConfig *config) {
    *clusters = 1;
    return CUDA_SUCCESS;
}
CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                const cuuint64_t *dims, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *element_strides, CUtensorMapInterleave interleave,
                                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                                CUtensorMapFloatOOBfill fill) {
    return CUDA_ERROR_NOT_SUPPORTED;
}
