"""Random layers against a contract; ``python tests/fuzz --help`` says how to run it.

    draw.py       a case from (seed, number): sizes, options, dtypes, views, routing, numbers that are exact
    truth.py      what a case gives, in float64, and how far off each element may be
    contract.py   what has to hold: right numbers, same bits, nothing read that nobody wrote, NaN confined
    places.py     where it runs: NumPy, CuPy, or the CUDA sources on the CPU
    __main__.py   the command, which prints seed and counts

Numbers are small integers, most of them 0 among the tokens, and factors are powers of 2. Wherever no activation
rounds, every sum is then exact in any order, the result is known to the last bit, and a row, a column or an expert in
the wrong place is a gross error.
"""
