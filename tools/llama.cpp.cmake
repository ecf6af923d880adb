# Included inside llama.cpp's own project, so that it overrides the bindings' settings.

# The bindings force an unused library on (chat parsers, web client), which more than doubles the compile time.
set(LLAMA_BUILD_COMMON OFF)

# llama.cpp compiles ggml-base, which has the quantizers, for any processor. Compiled for this one, Q6_K is a sixth faster
# and Q8_0 twice as fast. Without contracted multiplications the results are the same bits on every machine. Our own
# sources are added to the library: each states its reason.
function(extend_ggml_base)
    if(MSVC OR NOT CMAKE_C_COMPILER_ID MATCHES "GNU|Clang")
        return()
    endif()
    set(options -ffp-contract=off -fno-math-errno -fno-trapping-math)
    if(GGML_NATIVE AND CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
        list(APPEND options -march=native)
    endif()
    target_compile_options(ggml-base PRIVATE $<$<COMPILE_LANGUAGE:C>:${options}>)
    set(folder "${CMAKE_CURRENT_FUNCTION_LIST_DIR}")
    target_sources(ggml-base PRIVATE "${folder}/quantizers.cpp" "${folder}/integer_peak.c")
    set_source_files_properties(
        "${folder}/quantizers.cpp" TARGET_DIRECTORY ggml-base PROPERTIES COMPILE_OPTIONS "${options}")
endfunction()
cmake_language(DEFER CALL extend_ggml_base)

# GCC spills registers in the large loops that multiply repacked K-quants. Scheduling before register allocation, which
# is off by default on x86, makes the prefill of Q4_K a third faster (benchmarks/LOG.md); clang does it by itself.
function(schedule_repacked_kernels)
    if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
        set_source_files_properties(
            "${CMAKE_CURRENT_SOURCE_DIR}/ggml/src/ggml-cpu/arch/x86/repack.cpp" TARGET_DIRECTORY ggml-cpu
            PROPERTIES COMPILE_OPTIONS "-fschedule-insns;-fsched-pressure")
    endif()
endfunction()
cmake_language(DEFER CALL schedule_repacked_kernels)
