"""A small world of drawn characters, in which personalisation can be seen and measured without any download."""
