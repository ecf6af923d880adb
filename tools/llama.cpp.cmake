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
    target_sources(ggml-base PRIVATE "${folder}/quantizers.cpp" "${folder}/packed_rows.cpp" "${folder}/integer_peak.c")
    set_source_files_properties(
        "${folder}/quantizers.cpp" "${folder}/packed_rows.cpp" TARGET_DIRECTORY ggml-base PROPERTIES COMPILE_OPTIONS "${options}")
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

# Compiles a copy of a source of ggml-cpu in which `old` is replaced by `new`. Several edits of a source add up.
function(edit_source path old new)
    set(source "${CMAKE_CURRENT_SOURCE_DIR}/ggml/src/ggml-cpu/${path}")
    get_filename_component(name "${path}" NAME)
    get_filename_component(folder "${source}" DIRECTORY)
    set(copy "${CMAKE_CURRENT_BINARY_DIR}/${name}")
    get_target_property(sources ggml-cpu SOURCES)
    if(copy IN_LIST sources)
        set(source "${copy}")
    else()
        list(REMOVE_ITEM sources "ggml-cpu/${path}")
        set_target_properties(ggml-cpu PROPERTIES SOURCES "${sources};${copy}")
        set_source_files_properties("${copy}" TARGET_DIRECTORY ggml-cpu PROPERTIES INCLUDE_DIRECTORIES "${folder}")
    endif()
    file(READ "${source}" text)
    string(REPLACE "${old}" "${new}" edited "${text}")
    if(edited STREQUAL text)
        message(FATAL_ERROR "${source} does not contain \"${old}\" any more: update tools/llama.cpp.cmake")
    endif()
    file(WRITE "${copy}" "${edited}")
endfunction()

# While a token is generated, llama.cpp divides a matrix into chunks of 64 rows, about 50 kB, which the threads take in
# turn: at each chunk, hardware prefetching starts over. Four chunks per thread, as llama.cpp itself uses for repacked
# weights, make generation 1.17 to 1.47 times as fast (benchmarks/LOG.md) and still let a fast core take more. Products
# with few columns (several sequences, or drafted tokens) are divided the same way.
function(enlarge_chunks)
    set(count "(nr0 + chunk_size - 1) / chunk_size")
    edit_source("ggml-cpu.c" "nchunk0 = ${count};" "nchunk0 = nr1 > chunk_size ? ${count} : MIN(${count}, nth * 4);")
endfunction()
cmake_language(DEFER CALL enlarge_chunks)

# On x86 with AVX512-VNNI or AVX-VNNI, products of Q5_0 and Q8_0 weights use our own kernels: prompts are computed 2.4
# times as fast, the tokens of eight sequences twice as fast (benchmarks/LOG.md). On other x86 processors and for other
# types, llama.cpp uses llamafile's kernels for prompts even for two columns, where they read four rows of weights at a
# time and take as long as for four: with fewer than seven columns of 8-bit values, the kernels for one column are 1.05
# to 1.7 times as fast.
function(add_block_kernels)
    if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64" AND GGML_LLAMAFILE)
        edit_source("llamafile/sgemm.cpp" "#include \"sgemm.h\"" "#include \"sgemm.h\"\n#include \"block_gemm.h\"")
        edit_source("llamafile/sgemm.cpp" "if (n < 2)" "if (n < (Btype == GGML_TYPE_Q8_0 ? 7 : 2))")
        edit_source("llamafile/sgemm.cpp" "    // only enable sgemm for prompt processing"
            "    if (block_gemm(params, m, n, k, A, lda, B, ldb, C, ldc, Atype, Btype)) {\n        return true;\n    }\n")
        set(folder "${CMAKE_CURRENT_FUNCTION_LIST_DIR}")
        target_sources(ggml-cpu PRIVATE "${folder}/block_gemm.cpp")
        target_include_directories(ggml-cpu PRIVATE "${folder}")
    endif()
endfunction()
cmake_language(DEFER CALL add_block_kernels)

# On x86, attention uses our own kernel, which makes flash attention faster than standard attention (llama.cpp's is
# slower): 1.2 to 1.4 times for prompts at a depth of 2,000 tokens, 1.1 to 1.3 times for single tokens. Cells of other
# sequences cost nothing (benchmarks/LOG.md).
function(add_attention_kernel)
    if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
        set(call "ggml_compute_forward_flash_attn_ext_f16(params, dst);")
        edit_source("ops.cpp" "#include \"ops.h\"" "#include \"ops.h\"\n#include \"attention.h\"")
        edit_source("ops.cpp" "                ${call}" "                if (!compute_attention(params, dst)) ${call}")
        set(folder "${CMAKE_CURRENT_FUNCTION_LIST_DIR}")
        target_sources(ggml-cpu PRIVATE "${folder}/attention.cpp")
        target_include_directories(ggml-cpu PRIVATE "${folder}")
    endif()
endfunction()
cmake_language(DEFER CALL add_attention_kernel)
