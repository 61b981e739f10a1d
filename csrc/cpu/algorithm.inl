// The algorithms over the ISA's Vec. Each ISA file includes this inside its own namespace and target region, so that no
// inline function compiled for a newer machine can be picked by the linker for an older one.
static constexpr int kBlock = kVecs * Vec::width;

#include "cpu/gemm.inl"
#include "cpu/image.inl"
#include "cpu/epilogue.inl"
#include "cpu/filters.inl"
#include "cpu/winograd_1d.inl"
#include "cpu/winograd.inl"
#include "cpu/winograd_grad.inl"
#include "cpu/direct.inl"
#include "cpu/pool.inl"
#include "cpu/linear.inl"
#include "cpu/peak.inl"
#include "cpu/table.inl"
