cdef extern from *:
    """
    #if defined(__aarch64__)
    #define DMAKIT_DMA_WMB() __asm__ volatile("dmb oshst" ::: "memory")
    #define DMAKIT_DMA_RMB() __asm__ volatile("dmb oshld" ::: "memory")
    #elif defined(__x86_64__)
    #define DMAKIT_DMA_WMB() __asm__ volatile("" ::: "memory")
    #define DMAKIT_DMA_RMB() __asm__ volatile("" ::: "memory")
    #else
    #define DMAKIT_DMA_WMB() __sync_synchronize()
    #define DMAKIT_DMA_RMB() __sync_synchronize()
    #endif
    static inline void dmakit_store32(unsigned int *at, unsigned int value)
    {
        DMAKIT_DMA_WMB();
        *(volatile unsigned int *)at = value;
    }
    static inline unsigned long long dmakit_load64(unsigned long long *at)
    {
        unsigned long long value = *(volatile unsigned long long *)at;
        DMAKIT_DMA_RMB();
        return value;
    }
    """
    void store32 "dmakit_store32"(unsigned int* at, unsigned int value) noexcept nogil
    unsigned long long load64 "dmakit_load64"(unsigned long long* at) noexcept nogil
