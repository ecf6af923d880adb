// ggml's buffers (repacked weights, the KV cache, activations) in huge pages, on Linux.
//
// The linker replaces posix_memalign in libggml-base with this function (--wrap, see llama.cpp.cmake). The kernel provides
// huge pages for a large block if transparent_hugepage is "always" or "madvise", and small ones otherwise.

#include <stddef.h>
#include <sys/mman.h>

#define HUGE_PAGE ((size_t) 2 << 20)

int __real_posix_memalign(void ** memory, size_t alignment, size_t size);

int __wrap_posix_memalign(void ** memory, size_t alignment, size_t size) {
    if (size < 2 * HUGE_PAGE || alignment > HUGE_PAGE) {
        return __real_posix_memalign(memory, alignment, size);
    }
    int result = __real_posix_memalign(memory, HUGE_PAGE, size);
    if (result == 0) {
        madvise(*memory, size / HUGE_PAGE * HUGE_PAGE, MADV_HUGEPAGE);
    }
    return result;
}
