// How images are cut into Winograd's tiles, and the order in which these are numbered.
#pragma once
#include <algorithm>
#include <cstdint>

namespace vggfast::cpu {

// Output pixels from (4 * row, 4 * col) on.
struct Tile {
  int64_t n, row, col;
};

// Tiles of one size, the same rectangle of every image, numbered in [N, rows, cols] order from `first` on.
struct TileRegion {
  int64_t first, images, row, rows, col, cols;
  int64_t end() const { return first + images * rows * cols; }
  Tile at(int64_t t) const {
    t -= first;
    return {t / (rows * cols), row + t / cols % rows, col + t % cols};
  }
  void next(Tile& tile) const { // the one after it, without a division
    if (++tile.col < col + cols) return;
    tile.col = col;
    if (++tile.row < row + rows) return;
    tile.row = row;
    ++tile.n;
  }
};

// Whether F(2) computes the last row and the last column of tiles: those are then 2 pixels high or wide instead of 4.
struct Edges {
  bool row = false, column = false;
};

// F(2) takes 0, +-sqrt(2) and infinity of F(4)'s six points, and with them its filters.
static inline bool edges_have_point(int i) {
  return i == 0 || i >= 3;
}

// The tiles of a batch, by size: last column, whole, last row, corner. In this order the tiles that have a point lie together,
// whichever of the 36 it is, so that its product is one.
struct TileGrid {
  int64_t images, rows, cols;
  Edges edges;
  int64_t count() const { return images * rows * cols; }
  int64_t whole_rows() const { return rows - edges.row; }
  int64_t whole_cols() const { return cols - edges.column; }
  TileRegion last_column() const { return {0, images, 0, whole_rows(), whole_cols(), edges.column}; }
  TileRegion whole() const { return {last_column().end(), images, 0, whole_rows(), 0, whole_cols()}; }
  TileRegion last_row() const { return {whole().end(), images, whole_rows(), edges.row, 0, whole_cols()}; }
  TileRegion corner() const { return {last_row().end(), images, whole_rows(), edges.row, whole_cols(), edges.column}; }
  TileRegion region_of(int64_t t) const {
    if (t >= last_row().end()) return corner();
    if (t >= whole().end()) return last_row();
    return t >= whole().first ? whole() : last_column();
  }
  Tile at(int64_t t) const { return region_of(t).at(t); }
};

struct TileRange {
  TileGrid grid;
  int64_t begin, end;
  int64_t count() const { return end - begin; }
  TileRange in(const TileRegion& region) const { return between(region.first, region.end()); }
  // Those that have a point of the 36: tiles of the last row lack some of its rows, tiles of the last column some of its columns.
  TileRange with_point(int point) const {
    if (!grid.edges.row && !grid.edges.column) return *this;
    const bool last_row = edges_have_point(point / 6), last_column = edges_have_point(point % 6);
    const int64_t from = last_column ? 0 : grid.whole().first;
    const int64_t to = !last_row ? grid.whole().end() : last_column ? grid.count() : grid.last_row().end();
    return between(from, to);
  }

private:
  TileRange between(int64_t from, int64_t to) const { return {grid, std::clamp(from, begin, end), std::clamp(to, begin, end)}; }
};

} // namespace vggfast::cpu
