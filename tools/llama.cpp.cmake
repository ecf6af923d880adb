# Included inside llama.cpp's own project, where it wins over the bindings.

# The bindings force an unused library on (chat parsers, web client), which more than doubles the compile.
set(LLAMA_BUILD_COMMON OFF)

# ggml-base, where the quantizers are, is compiled for any processor there; for this one Q6_K is a sixth quicker and
# Q8_0 twice as quick. Without contracted multiplications the results are the same bits on every machine. Beside them
# come our own Q4_K, Q5_K, Q6_K and Q8_0.
function(quantizers_for_this_processor)
    if(MSVC OR NOT CMAKE_C_COMPILER_ID MATCHES "GNU|Clang")
        return()
    endif()
    set(options -ffp-contract=off -fno-math-errno -fno-trapping-math)
    if(GGML_NATIVE AND CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
        list(APPEND options -march=native)
    endif()
    target_compile_options(ggml-base PRIVATE $<$<COMPILE_LANGUAGE:C>:${options}>)
    set(ours "${CMAKE_CURRENT_FUNCTION_LIST_DIR}/quantizers.cpp")
    target_sources(ggml-base PRIVATE "${ours}")
    set_source_files_properties("${ours}" TARGET_DIRECTORY ggml-base PROPERTIES COMPILE_OPTIONS "${options}")
endfunction()
cmake_language(DEFER CALL quantizers_for_this_processor)
