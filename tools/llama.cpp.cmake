# Included inside llama.cpp's own project, so that it overrides the bindings' settings.

# The bindings force an unused library on (chat parsers, web client), which more than doubles the compile time.
set(LLAMA_BUILD_COMMON OFF)

# llama.cpp compiles ggml-base, which has the quantizers, for any processor. Compiled for this one, Q6_K is a sixth faster
# and Q8_0 twice as fast. Without contracted multiplications the results are the same bits on every machine. Our own
# Q4_K, Q5_K, Q6_K and Q8_0 are added to the library.
function(compile_quantizers_for_this_processor)
    if(MSVC OR NOT CMAKE_C_COMPILER_ID MATCHES "GNU|Clang")
        return()
    endif()
    set(options -ffp-contract=off -fno-math-errno -fno-trapping-math)
    if(GGML_NATIVE AND CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
        list(APPEND options -march=native)
    endif()
    target_compile_options(ggml-base PRIVATE $<$<COMPILE_LANGUAGE:C>:${options}>)
    set(quantizers "${CMAKE_CURRENT_FUNCTION_LIST_DIR}/quantizers.cpp")
    target_sources(ggml-base PRIVATE "${quantizers}")
    set_source_files_properties("${quantizers}" TARGET_DIRECTORY ggml-base PROPERTIES COMPILE_OPTIONS "${options}")
endfunction()
cmake_language(DEFER CALL compile_quantizers_for_this_processor)
