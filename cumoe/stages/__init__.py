"""The four stages, in the order data passes through them: route, group, grouped_gemm, combine."""
