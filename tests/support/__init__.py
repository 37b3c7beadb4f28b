"""What tests share: oracles, tables of cases, models, and stand-ins for what is not there.

Functions named `assert_*` make a test's comparison; the others make what is compared.
"""
