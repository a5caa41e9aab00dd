"""What tests of code that uses this library need."""
