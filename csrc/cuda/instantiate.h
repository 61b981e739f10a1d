// From a plan's values to a template's arguments: the one place where a kernel's instantiations are chosen. What is not listed
// where they are used is not compiled, and asking for it is an error.
#pragma once

#include <stdexcept>
#include <string>
#include <type_traits>

#include "cuda/element.cuh"

namespace vggfast::cuda {

/// use(Element{}) with the one of `Elements` whose dtype it is.
template <class... Elements, class Use>
void with_element(const char* kernel_name, DType dtype, const Use& use) {
  const bool found = ((dtype == Elements::dtype ? (use(Elements{}), true) : false) || ...);
  if (!found) {
    throw std::runtime_error(std::string("vggfast: kernel ") + kernel_name + " is not compiled for this dtype");
  }
}

/// use(std::integral_constant<Tile, tile>{}) with the one of `tiles` that it is.
template <auto... tiles, class Tile, class Use>
void with_tile(const char* kernel_name, Tile tile, const Use& use) {
  const bool found = ((tile == tiles ? (use(std::integral_constant<Tile, tiles>{}), true) : false) || ...);
  if (!found) {
    throw std::runtime_error(std::string("vggfast: kernel ") + kernel_name + " is not compiled for the planned tile");
  }
}

} // namespace vggfast::cuda
