/* Empty annotations, so that a C compiler alone reads CUDA's headers of types: no CUDA toolkit is needed. */
#define __device_builtin__
#define __device_builtin_texture_type__
#define __device_builtin_surface_type__
#define __builtin_align__(bytes)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __host__
#define __device__
#define __cudart_builtin__
#define __location__(where)
#define CUDARTAPI
#define CUDARTAPI_CDECL
#define __CUDA_DEPRECATED
