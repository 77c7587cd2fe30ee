// The operand lists of wgmma: 8 registers per piece, as text and as constraints. Long, and nothing else.
#pragma once

#define LOWFAT_TEXT_0 "%0, %1, %2, %3, %4, %5, %6, %7"
#define LOWFAT_TEXT_8 "%8, %9, %10, %11, %12, %13, %14, %15"
#define LOWFAT_TEXT_16 "%16, %17, %18, %19, %20, %21, %22, %23"
#define LOWFAT_TEXT_24 "%24, %25, %26, %27, %28, %29, %30, %31"
#define LOWFAT_TEXT_32 "%32, %33, %34, %35, %36, %37, %38, %39"
#define LOWFAT_TEXT_40 "%40, %41, %42, %43, %44, %45, %46, %47"
#define LOWFAT_TEXT_48 "%48, %49, %50, %51, %52, %53, %54, %55"
#define LOWFAT_TEXT_56 "%56, %57, %58, %59, %60, %61, %62, %63"
#define LOWFAT_TEXT_64 "%64, %65, %66, %67, %68, %69, %70, %71"
#define LOWFAT_TEXT_72 "%72, %73, %74, %75, %76, %77, %78, %79"
#define LOWFAT_TEXT_80 "%80, %81, %82, %83, %84, %85, %86, %87"
#define LOWFAT_TEXT_88 "%88, %89, %90, %91, %92, %93, %94, %95"
#define LOWFAT_TEXT_96 "%96, %97, %98, %99, %100, %101, %102, %103"
#define LOWFAT_TEXT_104 "%104, %105, %106, %107, %108, %109, %110, %111"
#define LOWFAT_TEXT_112 "%112, %113, %114, %115, %116, %117, %118, %119"
#define LOWFAT_TEXT_120 "%120, %121, %122, %123, %124, %125, %126, %127"

#define LOWFAT_REGISTERS_8 LOWFAT_TEXT_0
#define LOWFAT_REGISTERS_16 LOWFAT_REGISTERS_8 ", " LOWFAT_TEXT_8
#define LOWFAT_REGISTERS_32 LOWFAT_REGISTERS_16 ", " LOWFAT_TEXT_16 ", " LOWFAT_TEXT_24
#define LOWFAT_REGISTERS_64 \
  LOWFAT_REGISTERS_32 ", " LOWFAT_TEXT_32 ", " LOWFAT_TEXT_40 ", " LOWFAT_TEXT_48 ", " LOWFAT_TEXT_56
#define LOWFAT_REGISTERS_128                                                                                              \
  LOWFAT_REGISTERS_64 ", " LOWFAT_TEXT_64 ", " LOWFAT_TEXT_72 ", " LOWFAT_TEXT_80 ", " LOWFAT_TEXT_88 ", " LOWFAT_TEXT_96 \
                      ", " LOWFAT_TEXT_104 ", " LOWFAT_TEXT_112 ", " LOWFAT_TEXT_120

#define LOWFAT_IN_OUT_8(d, i) \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define LOWFAT_IN_OUT_16(d, i) LOWFAT_IN_OUT_8(d, i), LOWFAT_IN_OUT_8(d, i + 8)
#define LOWFAT_IN_OUT_32(d, i) LOWFAT_IN_OUT_16(d, i), LOWFAT_IN_OUT_16(d, i + 16)
#define LOWFAT_IN_OUT_64(d, i) LOWFAT_IN_OUT_32(d, i), LOWFAT_IN_OUT_32(d, i + 32)
#define LOWFAT_IN_OUT_128(d, i) LOWFAT_IN_OUT_64(d, i), LOWFAT_IN_OUT_64(d, i + 64)
