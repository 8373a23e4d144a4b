// What a chunk keeps for each latent it meets: sums for each channel, then one for each row of the image that the chunk
// reaches, and one for each column that pixels of the latent's label have reached in it.
#pragma once

#include "features.h"

namespace sca::SCA_CPU_CAPABILITY {
namespace {

template <typename T>
class PartialRows {
 public:
  // `count` rows with so many sums for channels, at most `rows` for rows and `columns` for columns.
  PartialRows(Arena& arena, int64_t count, int64_t channel_sums, int64_t rows, int64_t columns)
      : channel_sums_(channel_sums),
        column_begin_(channel_sums + padded<T>(rows)),
        width_(column_begin_ + padded<T>(columns)),
        memory_(arena.take<T>(count * width_)) {}

  T* at(int64_t index) const { return memory_ + index * width_; }

  // All but the columns, none of which is reached yet.
  void clear(T* sums) const {
    for (int64_t i = 0; i < column_begin_; ++i) sums[i] = 0;
  }
  void scale(T* sums, T factor, Range reached) const {
    for (int64_t i = 0; i < column_begin_; ++i) sums[i] *= factor;
    for (int64_t i = reached.begin; i < reached.end; ++i) sums[column_begin_ + i] *= factor;
  }

  // Adds up a table by the rows, of which the chunk's first is `first_row`, and by the columns of the image.
  void add_by_position(const Runs& runs, const RowTable<T>& table, int64_t count, T* const* sums, int64_t first_row,
                       Range& reached) const {
    reach(runs, sums, count, reached);
    for (int64_t j = 0; j < count; j += kTogether) {
      add_some_by_position(runs, table.rows + j, smaller(kTogether, count - j), sums + j, first_row);
    }
  }

  // target[row] += factor * sum, for each row of the chunk
  void add_rows(const T* sums, T factor, Range rows, T* target) const {
    for (int64_t r = rows.begin; r < rows.end; ++r) target[r] += factor * sums[channel_sums_ + r - rows.begin];
  }
  void add_columns(const T* sums, T factor, Range reached, T* target) const {
    for (int64_t c = reached.begin; c < reached.end; ++c) target[c] += factor * sums[column_begin_ + c];
  }
  void add_to_total(const T* sums, Range rows, T& total) const {
    for (int64_t r = 0; r < rows.size(); ++r) total += sums[channel_sums_ + r];
  }

 private:
  // Sums that are added to in turns: what is added to one place of memory waits for what was added there before.
  static constexpr int64_t kTogether = 8;

  void add_some_by_position(const Runs& runs, T* const* table, int64_t count, T* const* sums, int64_t first_row) const {
    // The sums over the lanes of several vectors are made together, too.
    Vector<T> values[kTogether][kLanes<T>];
    int64_t row[kLanes<T>], pending = 0;
    const auto add_to_rows = [&] {
      for (int64_t j = 0; j < count; ++j) {
        for (int64_t i = pending; i < kLanes<T>; ++i) values[j][i] = Vector<T>{};
        T totals[kLanes<T>];
        store<T>(totals, sum_each<T>(values[j]));
        for (int64_t i = 0; i < pending; ++i) sums[j][channel_sums_ + row[i]] += totals[i];
      }
      pending = 0;
    };
    for (const Run& run : runs) {
      each_piece<T>(run, [&](int64_t i, auto size) {
        for (int64_t j = 0; j < count; ++j) {
          T* column = sums[j] + column_begin_ + run.column + i;
          values[j][pending] = load_some(table[j] + run.begin + i, size);
          store_some<T>(column, load_some(column, size) + values[j][pending], size);
        }
        row[pending++] = run.row - first_row;
        if (pending == kLanes<T>) add_to_rows();
      });
    }
    if (pending > 0) add_to_rows();
  }

  // Widens what is reached to the columns of some runs.
  void reach(const Runs& runs, T* const* sums, int64_t count, Range& reached) const {
    Range wanted = reached.size() > 0 ? reached : Range{runs.list[0].column, runs.list[0].column};
    const Range before = reached.size() > 0 ? reached : wanted;
    for (const Run& run : runs) {
      wanted.begin = smaller(wanted.begin, run.column);
      wanted.end = larger(wanted.end, run.column + run.size);
    }
    for (int64_t j = 0; j < count; ++j) {
      T* columns = sums[j] + column_begin_;
      for (int64_t c = wanted.begin; c < before.begin; ++c) columns[c] = 0;
      for (int64_t c = before.end; c < wanted.end; ++c) columns[c] = 0;
    }
    reached = wanted;
  }

  int64_t channel_sums_, column_begin_, width_;
  T* memory_;
};

}  // namespace
}  // namespace sca::SCA_CPU_CAPABILITY
