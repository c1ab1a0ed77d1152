/* See stages/engines/numerics.py. MKL asks this function, which its library exports, whether it runs on an Intel processor, and
   honours MKL_CBWR=AVX2 on those only. Loaded before libtorch_cpu.so, this definition takes precedence over MKL's. */
int mkl_serv_intel_cpu_true(void) { return 1; }
