"""Right and wrong answers to the checks, one module for each module of checks.

RIGHT: {check: [answer, ...]}. WRONG: {check: [(answer, words of the message), ...]}.
"""
