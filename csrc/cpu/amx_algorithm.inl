// What amx.cpp needs over Vec and Tiles.
static constexpr int kBlock = kVecs * Vec::width;

#include "cpu/image.inl"
#include "cpu/epilogue.inl"
#include "cpu/filters.inl"
#include "cpu/amx.inl"
#include "cpu/amx_grad.inl"
#include "cpu/pieces.inl"
